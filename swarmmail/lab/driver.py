"""What a lab needs from whatever makes its machines: containers, or virtual machines.

A driver makes, shows and removes machines. It knows nothing of inventories, keys on disk or certificates, and
nothing above it knows how the machines came to be: they are reached by SSH like any other host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from swarmmail.lab.naming import Planned, Subnets, Topology, Variant

Kind = Literal["container", "vm"]


@dataclass(frozen=True)
class Access:
    """How the lab's operator gets in: for root, ``admin`` and ``deploy`` alike."""

    public_key: str  # a line of authorized_keys
    sudo_password: str  # of `admin`

    def __repr__(self) -> str:  # the password must not get into a traceback
        return "Access(...)"


@dataclass(frozen=True)
class Machine:
    """A host as it is."""

    name: str
    address: str
    variant: Variant
    state: str  # the driver's word: running, exited, ...
    memory: int | None = None  # bytes in use, without the page cache; None: not running
    nat: bool = False  # behind the lab's router


class Driver(Protocol):
    """Raises SwarmmailError (host, step, last journal lines) when a machine does not come up."""

    kind: Kind

    def enter(self) -> list[str]:
        """The words before a command of this machine that shall see the lab's bridge; none where it sees it anyway."""

    def network(self, topology: Topology | None) -> Subnets:
        """Make what is missing of the lab's networks. ``topology`` None: what is there, else ``flat``.

        Raises SwarmmailError when the networks that are there are of another topology."""

    def find_network(self) -> Subnets | None:
        """The lab's networks, if there are any."""

    def router(self) -> str:
        """The state of the router in the driver's word; empty where there is none."""

    def machines(self, memory: bool = False) -> list[Machine]:
        """All machines of this lab, in the order of their addresses. Memory only if asked: it takes time."""

    def ensure(self, wanted: Sequence[Planned], access: Access) -> list[str]:
        """Make what is missing, start what stands still, let ``access`` in, wait until SSH answers
        (and Docker, in the variant that has it). The names of those that were changed, the router's too."""

    def host_keys(self, names: Sequence[str]) -> dict[str, str]:
        """Each machine's SSH host key as "type base64", asked of the machine itself, not of the network."""

    def power_off(self, host: str) -> None:
        """As if the plug was pulled; ``ensure`` starts it again. What is off stays off."""

    def remove(self, images: bool = False) -> list[str]:
        """Remove every trace, also of half-made machines. What was removed, a line each."""
