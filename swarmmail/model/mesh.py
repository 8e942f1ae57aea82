"""The WireGuard mesh of the hosts, as text: who has which address, and each host's configuration.

No private key is here: it is made on the host and stays there (``PostUp`` reads it from a file).
Facts: wg(8), wg-quick(8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from swarmmail.model.errors import Refused
from swarmmail.model.facts import MESH, HostFacts
from swarmmail.model.inventory import Inventory
from swarmmail.model.network import WIREGUARD_OVERHEAD

KEY_FILE = f"/etc/wireguard/{MESH}.key"
CONFIG_FILE = f"/etc/wireguard/{MESH}.conf"
KEEPALIVE = 25
"""Seconds; wg(8): keeps a mapping of NAT or of a stateful firewall open."""
LOST = 180
"""Seconds after a handshake when nobody takes packets of its session any more (WireGuard's paper, section 6.1:
Reject-After-Time). While packets pass, keepalives for one, the next handshake is made after 120."""


@dataclass(frozen=True)
class Mesh:
    """Subnet and MTU of the tunnel, and each host's address in it."""

    subnet: IPv4Network
    mtu: int
    addresses: Mapping[str, IPv4Address]


def interface_of(config: str) -> IPv4Interface | None:
    """The address that a configuration gives its host; None when it holds none that can be read."""
    found = re.search(r"^Address *= *(\S+)", config, re.MULTILINE)
    try:
        return IPv4Interface(found[1]) if found else None
    except ValueError:
        return None


def design(
    inventory: Inventory,
    hosts: Mapping[str, HostFacts],
    free: IPv4Network,
    underlay_mtu: int,
    members: Mapping[str, str] | None = None,
) -> Mesh:
    """Keep every address that a host has; give new hosts the lowest ones that are free.

    ``members``: the addresses that the Swarm knows, by host, also of hosts that are not in the inventory (any more).

    Raises:
        Refused: two hosts have different subnets or the same key, or the subnet is too small.
    """
    members = members or {}
    _keys_differ(hosts)
    have = {n: i for n, facts in hosts.items() if (i := interface_of(facts.mesh.config)) is not None}
    wanted = inventory.network.tunnel_subnet
    subnet = free if wanted == "auto" else IPv4Network(wanted)
    if have:
        subnet = next(iter(have.values())).network if wanted == "auto" else subnet
        for name, interface in have.items():
            if interface.network != subnet:
                raise Refused(
                    f"its tunnel is in {interface.network}, the others' in {subnet}",
                    host=name,
                    step="mesh",
                    hint="set network.tunnel_subnet to what is there, or leave the swarm on that host first",
                )
    addresses: dict[str, IPv4Address] = {}
    # where a configuration was lost, the running tunnel knows, or the Swarm, which cannot change an address
    for source in (
        {name: str(interface.ip) for name, interface in have.items()},
        {name: facts.mesh.address for name, facts in hosts.items()},
        {name: facts.node_address for name, facts in hosts.items()},
        members,
    ):
        for name in hosts:
            address = _address_in(subnet, source.get(name, ""))
            if name not in addresses and address is not None and address not in addresses.values():
                addresses[name] = address
    strangers = {text for name, text in members.items() if name not in hosts}
    rest = (a for a in subnet.hosts() if a not in set(addresses.values()) and str(a) not in strangers)
    for name in inventory.hosts:
        if name not in addresses:
            address = next(rest, None)
            if address is None:
                raise Refused(f"subnet {subnet} has no address left", host=name, step="mesh")
            addresses[name] = address
    return Mesh(subnet, underlay_mtu - WIREGUARD_OVERHEAD, addresses)


def _keys_differ(hosts: Mapping[str, HostFacts]) -> None:
    owners: dict[str, str] = {}
    for name, facts in hosts.items():
        if facts.mesh.public_key and owners.setdefault(facts.mesh.public_key, name) != name:
            raise Refused(
                f"has the same tunnel key as {owners[facts.mesh.public_key]}: is it a copy of that machine?",
                host=name,
                step="mesh",
                hint=f"rm {KEY_FILE} {CONFIG_FILE} there, docker swarm leave --force if it is not meant to be a "
                "member yet, then run this again",
            )


def _address_in(subnet: IPv4Network, text: str) -> IPv4Address | None:
    try:
        address = IPv4Address(text)
    except ValueError:
        return None
    return address if address in subnet else None


def render(inventory: Inventory, mesh: Mesh, name: str, keys: Mapping[str, str]) -> str:
    """The configuration of one host for ``wg-quick``. ``keys``: public key of every host, by name.

    A host behind NAT has no port of its own: nobody can call it there, and with a new one each time its tunnel starts
    or is changed it gets a new mapping in its router, whatever became of the old one.
    """
    me, port = inventory.hosts[name], inventory.tunnel_port(name)
    lines = [
        "# Written by swarmmail bootstrap. The private key is in its own file.",
        "[Interface]",
        f"Address = {mesh.addresses[name]}/{mesh.subnet.prefixlen}",
        *([f"ListenPort = {port}"] if port else []),
        f"MTU = {mesh.mtu}",
        f"PostUp = wg set %i private-key {KEY_FILE}",
    ]
    for peer, spec in inventory.hosts.items():
        if peer == name:
            continue
        lines += [
            "",
            f"# {peer}",
            "[Peer]",
            f"PublicKey = {keys[peer]}",
            f"AllowedIPs = {mesh.addresses[peer]}/32",
        ]
        if there := inventory.tunnel_port(peer):
            host = f"[{spec.advertise}]" if ":" in spec.advertise else spec.advertise
            lines.append(f"Endpoint = {host}:{there}")
        if me.nat or spec.nat:
            lines.append(f"PersistentKeepalive = {KEEPALIVE}")
    return "\n".join(lines)
