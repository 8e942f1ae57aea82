"""Pure decisions about addresses, packet sizes and the encryption back end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network

from swarmmail.model.errors import Refused
from swarmmail.model.facts import HostFacts
from swarmmail.model.inventory import Inventory

DATA_PORT = 4789
"""UDP port of VXLAN (RFC 7348); Swarm's default data-path port."""
WIREGUARD_OVERHEAD = 80
"""Bytes: 40 IPv6 + 8 UDP + 32 WireGuard (wg-quick(8) takes off the same)."""


@dataclass(frozen=True)
class Block:
    """A /16 that nobody uses, and how we cut it."""

    tunnel: IPv4Network
    overlay: IPv4Network
    pool: IPv4Network
    """For networks whose address Swarm chooses itself (ingress, above all), in pieces of /24."""


def taken(hosts: Iterable[HostFacts], inventory: Inventory) -> list[IPv4Network]:
    """Every network that a host routes or resolves by, and every address by which hosts reach each other."""
    networks: list[IPv4Network] = []
    for host in hosts:
        networks += host.routes
        for text in (*host.resolvers, *(a for own in host.addresses.values() for a in own)):
            address = ip_address(text.split("%")[0])
            if isinstance(address, IPv4Address):
                networks.append(IPv4Network(address))
    for wanted in inventory.hosts.values():
        network = ip_network(wanted.advertise)
        if isinstance(network, IPv4Network):
            networks.append(network)
    return networks


def free_block(used: list[IPv4Network]) -> Block:
    """The first private /16 that overlaps none of ``used``.

    Raises:
        Refused: there is none; the inventory has to name the subnets.
    """
    candidates = [f"10.{i}.0.0/16" for i in range(90, 255)] + [f"10.{i}.0.0/16" for i in range(90)]
    candidates += [f"172.{i}.0.0/16" for i in range(31, 15, -1)]
    for text in candidates:
        block = IPv4Network(text)
        if not any(block.overlaps(network) for network in used):
            pieces = list(block.subnets(new_prefix=24))
            return Block(tunnel=pieces[0], overlay=pieces[1], pool=list(block.subnets(new_prefix=17))[1])
    raise Refused(
        "no private /16 is free on all hosts",
        step="choose subnets",
        hint="set network.subnet and network.tunnel_subnet in the inventory",
    )


def underlay_mtu(hosts: Mapping[str, HostFacts], inventory: Inventory) -> int:
    """Bytes: the smallest MTU of the links that carry the hosts' addresses; 1500 behind NAT."""
    if inventory.network.mtu != "auto":
        return int(inventory.network.mtu)
    found = []
    for name, facts in hosts.items():
        link = facts.link_of(inventory.hosts[name].advertise)
        found.append(facts.mtus.get(link, 1500) if link else 1500)
    return min(found, default=1500)


def choose_encryption(inventory: Inventory, hosts: Mapping[str, HostFacts], encrypted: bool | None) -> tuple[str, str]:
    """The back end, and why. ``encrypted``: what the overlay that is there already has; None if there is none.

    What is there is kept: a kernel that learns ESP by an upgrade is no reason to rebuild a network.

    Raises:
        Refused: the back end cannot work on a host.
    """
    asked = inventory.network.encryption
    if asked == "none":
        return "none", "the inventory says so: LMTP CROSSES THE NETWORK IN CLEAR TEXT"
    if asked == "auto":
        if encrypted:
            return "ipsec", "the overlay is there already"
        if any(facts.mesh.config for facts in hosts.values()):
            return "wireguard", "the tunnel is there already"
        without = sorted(name for name, facts in hosts.items() if not facts.esp)
        behind = _behind_nat(inventory, hosts)
        if not without and not behind:
            return "ipsec", "every kernel accepts an ESP state with AES-GCM"
        why = f"no ESP with AES-GCM in the kernel of {', '.join(without)}" if without else ""
        why += (", " if why and behind else "") + (f"{', '.join(behind)} behind NAT" if behind else "")
        _tunnel_possible(hosts)
        return "wireguard", why
    if asked == "ipsec":
        for name, facts in hosts.items():
            if not facts.esp:
                raise Refused(
                    "the kernel does not accept an ESP state with AES-GCM: nothing would pass",
                    host=name,
                    step="network.encryption: ipsec",
                    hint="load esp4 and gcm there, or write encryption: wireguard (or auto)",
                )
        for name in _behind_nat(inventory, hosts) if not encrypted else ():
            raise Refused(
                f"is behind address translation ({inventory.hosts[name].advertise} is on none of its links): ESP and "
                "VXLAN have no ports that a router could map, and what gets through breaks the overlay's UDP checksums "
                "(moby#37115)",
                host=name,
                step="network.encryption: ipsec",
                hint="write encryption: wireguard (or auto)",
            )
    else:
        _tunnel_possible(hosts)
    return asked, "the inventory says so"


def _behind_nat(inventory: Inventory, hosts: Mapping[str, HostFacts]) -> list[str]:
    """Hosts that are declared so, and those whose advertised address is not their own (an "elastic" address is one to
    one, and translated all the same)."""
    return sorted(
        name
        for name, host in inventory.hosts.items()
        if host.nat or (name in hosts and hosts[name].addresses and not hosts[name].link_of(host.advertise))
    )


def _tunnel_possible(hosts: Mapping[str, HostFacts]) -> None:
    for name, facts in hosts.items():
        if not facts.wireguard_kernel and not facts.tun:
            raise Refused(
                "neither WireGuard in the kernel nor /dev/net/tun for wireguard-go",
                host=name,
                step="network.encryption: wireguard",
                hint="load the module wireguard or tun there",
            )
