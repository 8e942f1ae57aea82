"""What is in force on a host, read from ``capture.sh``: tunnel, guard, ESP states, forwarding. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Any

from swarmmail.model import printed
from swarmmail.model.facts import MESH


@dataclass(frozen=True)
class Peer:
    """A peer of the tunnel, by its public key."""

    allowed: str = ""
    """Its address in the tunnel."""
    endpoint: tuple[str, int] | None = None
    handshake: float | None = None
    """Age of the last handshake in seconds; None when there was none. WireGuard makes one every 2 minutes while
    packets pass."""


@dataclass(frozen=True)
class State:
    """One host, while the captures ran."""

    directory: str = ""
    ready: str = ""
    """``yes``, or why the captures did not begin."""
    ignore: frozenset[int] = frozenset()
    """Indexes of links that are not the underlay: loopback, our tunnel, and Docker's bridges with their ports."""
    addresses: tuple[str, ...] = ()
    tunnel: str = ""
    """Address of the running tunnel; empty when it is down."""
    key: str = ""
    port: int = 0
    peers: Mapping[str, Peer] = field(default_factory=dict)
    blackholes: tuple[IPv4Network, ...] = ()
    guards_in: bool = False
    """VXLAN is taken from the tunnel only."""
    guards_out: bool = False
    states: frozenset[tuple[str, str, int]] = frozenset()
    """ESP states: source, target, SPI."""
    aead: bool = False
    marks: tuple[str, ...] = ()
    """Rules that mark outgoing VXLAN for ESP."""
    drops: tuple[str, ...] = ()
    """Rules that drop VXLAN which did not come by ESP."""
    forwarding: Mapping[str, str] = field(default_factory=dict)
    """Hardware address of a task elsewhere to the host (data-path address) that the overlay sends it to."""
    mtus: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Process of a task to its addresses with the MTU of their links, in bytes."""

    def peer_at(self, address: str) -> Peer | None:
        return next((peer for peer in self.peers.values() if peer.allowed == address), None)

    def covered(self, address: str) -> bool:
        """Whether a blackhole route catches an address when the tunnel is down."""
        return any(IPv4Network(address).subnet_of(network) for network in self.blackholes)


def parse(text: str) -> State:
    """Read what ``start`` printed; a section that is missing or can't be read counts as empty."""
    sections = printed.sections(text)

    def lines(name: str) -> list[list[str]]:
        return [line.split() for line in sections.get(name, "").splitlines() if line.strip()]

    def pairs(name: str) -> list[tuple[str, str]]:
        return [(words[0], words[1]) for words in lines(name) if len(words) > 1]

    def first(name: str) -> str:
        return sections.get(name, "").strip().split("\n")[0]

    clock = float(_number(first("clock")))
    links = printed.json_objects(sections.get("links", ""))
    guard = sections.get("guard", "")
    peers: dict[str, dict[str, Any]] = {}
    for key, *allowed in lines("allowed"):
        peers.setdefault(key, {})["allowed"] = (allowed or [""])[0].split("/")[0]
    for key, endpoint in pairs("endpoints"):
        if endpoint != "(none)":
            address, _, port = endpoint.rpartition(":")
            peers.setdefault(key, {})["endpoint"] = (address.strip("[]"), _number(port))
    for key, stamp in pairs("handshakes"):
        if stamp != "0":
            peers.setdefault(key, {})["handshake"] = max(0.0, clock - _number(stamp))
    states = re.findall(r"^src (\S+) dst (\S+)\s+proto esp spi (0x[0-9a-f]+)", sections.get("states", ""), re.MULTILINE)
    return State(
        directory=first("directory"),
        ready=sections.get("ready", "").strip(),
        ignore=frozenset(_not_underlay(links)),
        tunnel=next(
            (
                a["local"]
                for link in printed.json_objects(sections.get("tunnel", ""))
                for a in link.get("addr_info", ())
            ),
            "",
        ),
        key=first("key"),
        port=_number(first("port")),
        peers={key: Peer(**values) for key, values in peers.items()},
        blackholes=tuple(
            IPv4Network("0.0.0.0/0" if route["dst"] == "default" else route["dst"], strict=False)
            for route in printed.json_objects(sections.get("blackhole", ""))
            if "dst" in route
        ),
        guards_in=bool(re.search(rf'iifname != "{MESH}" udp dport \d+ .*drop', guard)),
        guards_out=bool(re.search(rf'oifname != "{MESH}" udp dport \d+ .*drop', guard)),
        states=frozenset((source, target, int(spi, 16)) for source, target, spi in states),
        aead="rfc4106(gcm(aes))" in sections.get("states", ""),
        marks=tuple(" ".join(words) for words in lines("marks") if "MARK" in words),
        drops=tuple(" ".join(words) for words in lines("drops") if "DROP" in words and "udp" in words),
        forwarding={
            entry["mac"].lower(): entry["dst"]
            for entry in printed.json_objects(sections.get("forwarding", ""))
            if "mac" in entry and "dst" in entry
        },
        mtus={
            int(name.split()[1]): {
                address["local"]: int(link.get("mtu", 0))
                for link in printed.json_objects(body)
                for address in link.get("addr_info", ())
                if "local" in address
            }
            for name, body in sections.items()
            if name.startswith("task ")
        },
    )


def _not_underlay(links: list[dict[str, Any]]) -> list[int]:
    bridges = {
        link["ifname"]
        for link in links
        if link.get("ifname") in ("docker0", "docker_gwbridge")
        or re.fullmatch(r"br-[0-9a-f]{12}", link.get("ifname", ""))
    }
    return [
        link["ifindex"]
        for link in links
        if "LOOPBACK" in link.get("flags", ())
        or link.get("ifname") == MESH
        or link.get("ifname") in bridges
        or link.get("master") in bridges
    ]


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
