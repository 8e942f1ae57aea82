"""What a manager says of its Swarm, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CLUSTER_LABEL = "swarmmail.cluster"
"""On the Swarm and on the overlay: which inventory's they are."""
HOST_LABEL = "swarmmail.host"
"""On a node: the host's name in the inventory (a host name may be shared, F30)."""
PLACE_LABEL = "swarmmail."
"""Prefix on a node: ``swarmmail.<service>=true`` says that the service's volume lives here."""
PLACED = "true"


@dataclass(frozen=True)
class Node:
    id: str
    hostname: str
    role: str
    """``manager`` or ``worker``."""
    state: str
    """``ready``, ``down``, ``unknown``, ``disconnected``."""
    availability: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    leader: bool = False
    engine: str = ""

    @property
    def host(self) -> str:
        return self.labels.get(HOST_LABEL, "")

    @property
    def places(self) -> frozenset[str]:
        """Services whose data lives on this node, by label."""
        return frozenset(
            key.removeprefix(PLACE_LABEL)
            for key, value in self.labels.items()
            if key.startswith(PLACE_LABEL) and key not in (HOST_LABEL, CLUSTER_LABEL) and value == PLACED
        )


@dataclass(frozen=True)
class Network:
    id: str
    name: str
    driver: str
    encrypted: bool
    subnet: str
    mtu: str
    attachable: bool
    cluster: str = ""


@dataclass(frozen=True)
class Swarm:
    id: str
    cluster: str
    """The value of ``CLUSTER_LABEL``; empty for a Swarm that swarmmail did not make."""
    manager: str
    """The host that was asked."""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)

    def node_of(self, host: str) -> Node | None:
        """The node that a host is, by label."""
        return next((node for node in self.nodes.values() if node.host == host), None)
