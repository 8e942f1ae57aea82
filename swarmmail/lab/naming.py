"""Names and addresses of a lab, derived from the folder it belongs to. Pure.

Two checkouts on one machine have two labs that cannot meet: every name carries a hash of the absolute path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal

Variant = Literal["host", "bare"]
Topology = Literal["flat", "nat"]
TOPOLOGIES: dict[str, Topology] = {"flat": "flat", "nat": "nat"}

# RFC 2544 sets this range aside for test set-ups: nobody routes it, and neither Docker's default pools
# (172.17/12, 192.168/16) nor Swarm's (10/8) reach into it. 512 labs of 254 addresses.
_POOL = IPv4Network("198.18.0.0/15")
MAX_HOSTS = 40
MAX_BARE = 9
_FIRST_HOST, _FIRST_BARE = 11, 51
_ROUTER = 254
INSIDE = "host3"
"""The host behind the router, with the topology ``nat``. One only: of two, neither could open a connection to the
other. The third, because the lab's inventory puts the mailboxes there: every mail has to cross the router."""


@dataclass(frozen=True)
class Planned:
    """A host as it shall be."""

    name: str
    variant: Variant
    number: int  # last octet of its address

    def address(self, subnet: IPv4Network) -> str:
        return str(subnet.network_address + self.number)


@dataclass(frozen=True)
class Subnets:
    """The lab's networks: one that every host is on, or with ``inner`` a second one behind a router."""

    outer: IPv4Network
    inner: IPv4Network | None = None

    @property
    def topology(self) -> Topology:
        return "nat" if self.inner else "flat"

    @property
    def router(self) -> str:
        """The router's address outside: what the world sees of the host behind it."""
        return str(self.outer.network_address + _ROUTER)

    @property
    def gateway(self) -> str:
        """The router's address inside; empty where there is none."""
        return str(self.inner.network_address + _ROUTER) if self.inner else ""

    def inside(self, host: str) -> bool:
        return self.inner is not None and host == INSIDE

    def address(self, host: Planned) -> str:
        subnet = self.inner if self.inner and self.inside(host.name) else self.outer
        return host.address(subnet)


@dataclass(frozen=True)
class Naming:
    """All names of the lab of one folder."""

    id: str  # 8 hex digits

    @classmethod
    def of(cls, root: Path) -> Naming:
        return cls(hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8])

    @property
    def network(self) -> str:
        return f"swarmmail-{self.id}"

    @property
    def bridge(self) -> str:
        """Name of the bridge device: at most 15 characters (IFNAMSIZ), so shorter than the others."""
        return f"sm-{self.id}"

    @property
    def uplink(self) -> str:
        """The device by which this machine reaches virtual hosts, whose bridge is in a namespace of its own."""
        return f"{self.bridge}-up"

    @property
    def inner_network(self) -> str:
        return f"{self.network}-inner"

    @property
    def inner_bridge(self) -> str:
        return f"{self.bridge}-in"

    @property
    def router(self) -> str:
        """The router's container."""
        return self.container("router")

    def container(self, host: str) -> str:
        return f"swarmmail-{self.id}-{host}"

    def volume(self, host: str) -> str:
        """The volume of the host's /var/lib/docker."""
        return f"swarmmail-{self.id}-{host}"

    def subnets(self, taken: Iterable[IPv4Network]) -> Iterator[IPv4Network]:
        """The subnets this lab may have, its own first, then the following ones, without those taken."""
        used = list(taken)
        pool = list(_POOL.subnets(new_prefix=24))
        start = int(self.id, 16) % len(pool)
        for subnet in pool[start:] + pool[:start]:
            if not any(subnet.overlaps(other) for other in used):
                yield subnet


def planned(hosts: int, bare: int = 0) -> list[Planned]:
    """``host1`` ... and ``bare1`` ..., each with its number for life: host1 is always .11."""
    return [Planned(f"host{i + 1}", "host", _FIRST_HOST + i) for i in range(hosts)] + [
        Planned(f"bare{i + 1}", "bare", _FIRST_BARE + i) for i in range(bare)
    ]


def addresses(subnets: Subnets) -> list[str]:
    """Every address that a host of this lab can ever have: what the lab's certificate is good for."""
    return [subnets.address(host) for host in planned(MAX_HOSTS, MAX_BARE)]


def routes(table: str) -> list[tuple[str, IPv4Network]]:
    """Device and destination of each route, from the text of ``/proc/net/route``.

    Addresses stand there in hexadecimal, in the byte order of the machine: little-endian here (proc_net(5)).
    """
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        destination = IPv4Address(int.from_bytes(bytes.fromhex(fields[1]), "little"))
        mask = IPv4Address(int.from_bytes(bytes.fromhex(fields[7]), "little"))
        found.append((fields[0], IPv4Network(f"{destination}/{mask}", strict=False)))
    return found
