"""What ``bootstrap`` has to do: from the inventory and what was observed, to a plan. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network

from swarmmail.model import mesh as mesh_model
from swarmmail.model import network as net
from swarmmail.model.errors import Refused
from swarmmail.model.facts import HostFacts
from swarmmail.model.inventory import Inventory
from swarmmail.model.plan import Action, Plan, Step
from swarmmail.model.swarm import Swarm

PACKAGES = ("docker.io",)
GOSSIP_PORT = 7946
"""TCP and UDP; Docker docs, "Getting started with swarm mode"."""
OURS = ("debian", "ubuntu")


def managers(inventory: Inventory) -> list[str]:
    """The hosts that become managers. An even number tolerates no more losses than the odd one below it
    (Docker docs, "Administer and maintain a swarm"), and two stop as soon as either is away: so one less."""
    wanted = [host.name for host in inventory.managers]
    return wanted if len(wanted) % 2 else wanted[:-1]


@dataclass(frozen=True)
class Observed:
    """Facts of every host, and the Swarm as a manager of it sees it (None: there is none yet)."""

    hosts: Mapping[str, HostFacts]
    swarm: Swarm | None = None


@dataclass(frozen=True)
class Design:
    """What the decisions came to: how to encrypt, which addresses, which sizes."""

    inventory: Inventory
    observed: Observed
    encryption: str
    why: str
    block: net.Block
    underlay_mtu: int
    mesh: mesh_model.Mesh | None
    files: Mapping[str, str] = field(default_factory=dict)
    """Path to SHA-256 of the files that every host of a mesh must hold."""

    @cached_property
    def keys(self) -> dict[str, str]:
        return {n: f.mesh.public_key for n, f in self.observed.hosts.items() if f.mesh.public_key}

    def swarm_address(self, host: str) -> str:
        """The address that a host advertises to the Swarm, and by which its VXLAN travels."""
        if self.mesh is not None:
            return str(self.mesh.addresses[host])
        return self.inventory.hosts[host].advertise

    @property
    def overlay_subnet(self) -> str:
        wanted = self.inventory.network.subnet
        return str(self.block.overlay) if wanted == "auto" else str(wanted)

    @property
    def network_mtu(self) -> int:
        """The driver's MTU option means the underlay; it takes its own overhead off (libnetwork#1309)."""
        return self.mesh.mtu if self.mesh is not None else self.underlay_mtu

    def mesh_config(self, host: str, keys: Mapping[str, str]) -> str:
        assert self.mesh is not None
        return mesh_model.render(self.inventory, self.mesh, host, keys)


def design(inventory: Inventory, observed: Observed, files: Mapping[str, str]) -> Design:
    """Decide. Raises Refused when the wanted state cannot be reached on these hosts."""
    hosts = observed.hosts
    overlay = observed.swarm.networks.get(inventory.network.name) if observed.swarm else None
    encryption, why = net.choose_encryption(inventory, hosts, overlay.encrypted if overlay else None)
    mtu = net.underlay_mtu(hosts, inventory)
    own = [i.network for f in hosts.values() if (i := mesh_model.interface_of(f.mesh.config)) is not None]
    used = [n for n in net.taken(hosts.values(), inventory) if not any(n.subnet_of(network) for network in own)]
    block = net.free_block(used)
    _wanted_subnets_free(inventory, observed, overlay is not None)
    mesh = mesh_model.design(inventory, hosts, block.tunnel, mtu) if encryption == "wireguard" else None
    return Design(inventory, observed, encryption, why, block, mtu, mesh, files if mesh else {})


def _wanted_subnets_free(inventory: Inventory, observed: Observed, overlay_there: bool) -> None:
    wanted = inventory.network.subnet
    if wanted == "auto" or overlay_there:
        return
    for name, facts in observed.hosts.items():
        for used in net.taken([facts], inventory):
            if IPv4Network(wanted).overlaps(used):
                raise Refused(
                    f"network.subnet {wanted} overlaps {used}, which this host uses",
                    host=name,
                    step="choose subnets",
                    hint="choose another, or write subnet: auto",
                )


def plan(design: Design) -> Plan:
    """The steps from what is to what is wanted; empty when there is nothing to do.

    Raises:
        Refused: a host belongs to another swarm, an address or an encryption differs from what is there,
            or an operating system that we cannot install Docker on.
    """
    inventory, observed = design.inventory, design.observed
    hosts, swarm = observed.hosts, observed.swarm
    steps: list[Step] = []
    notes = [f"encryption: {design.encryption} ({design.why})", *inventory.notes()]
    waits: list[str] = []
    chosen = managers(inventory)
    for spec in inventory.managers:
        if spec.name not in chosen:
            notes.append(
                f"{spec.name} stays a worker: {len(chosen) + 1} managers tolerate no more losses than "
                f"{len(chosen)}, and {'either' if len(chosen) == 1 else 'any half'} of them lost stops the Swarm"
            )
    if swarm is not None and swarm.cluster != inventory.cluster:
        raise Refused(
            f"is a manager of a swarm of {swarm.cluster or 'somebody else'}, not of {inventory.cluster}",
            host=swarm.manager,
            step="bootstrap",
            hint="if nothing there is needed: docker swarm leave --force on that host",
        )
    for name, facts in hosts.items():
        steps += _engine(name, facts, design)
        steps += _mesh(name, facts, design)
    lead = swarm.manager if swarm is not None else chosen[0]
    rejoin: set[str] = set()
    for name, facts in hosts.items():
        membership = _membership(name, facts, design)
        if membership == "lost":
            steps.append(
                Step(Action.LEAVE, name, f"leave the half-done membership ({facts.swarm_error or facts.swarm})")
            )
        if membership != "member":
            rejoin.add(name)
            if name == lead and swarm is None:
                steps.append(Step(Action.INIT, name, f"make the Swarm, advertise {design.swarm_address(name)}"))
            else:
                steps.append(Step(Action.JOIN, name, f"join the Swarm, advertise {design.swarm_address(name)}"))
    steps += _roles(design, chosen, lead)
    steps += _ghosts_and_labels(design, rejoin)
    steps += _network(design)
    if swarm is not None:
        for node in swarm.nodes.values():
            if node.host in hosts and hosts[node.host].node == node.id and node.state != "ready":
                waits.append(f"{node.host} is {node.state} in the Swarm")
        waits += _deaf(design, swarm)
    order = list(Action)
    steps.sort(key=lambda step: order.index(step.action))
    return Plan(tuple(steps), tuple(notes), tuple(waits))


def _deaf(design: Design, swarm: Swarm) -> list[str]:
    """Hosts that do not hear others by gossip. An agent that kept the keys of an earlier Swarm does that."""
    names = {node.address: node.host for node in swarm.nodes.values() if node.state == "ready" and node.host}
    return [
        f"{name} does not hear {', '.join(sorted(names[a] for a in missing))} by gossip: names will not resolve "
        f"(if it stays so: systemctl restart docker on {name})"
        for name, facts in design.observed.hosts.items()
        if facts.peers is not None
        and facts.node_address in names
        and (missing := names.keys() - facts.peers - {facts.node_address})
    ]


def _engine(name: str, facts: HostFacts, design: Design) -> list[Step]:
    need = [] if "dockerd" in facts.programs else ["docker.io"]
    if design.encryption == "wireguard":
        need += [
            package
            for program, package in (("wg-quick", "wireguard-tools"), ("nft", "nftables"))
            if program not in facts.programs
        ]
        if not facts.wireguard_kernel and "wireguard-go" not in facts.programs:
            need.append("wireguard-go")
    if need:
        if not facts.systemd or not ({facts.os, *facts.os_like} & set(OURS)):
            raise Refused(
                f"lacks {', '.join(need)}, and {facts.os_name or 'its system'} is not Debian or Ubuntu with systemd",
                host=name,
                step="install",
                hint="install them there by hand, then run this again",
            )
        return [Step(Action.INSTALL, name, f"install {' '.join(need)}", " ".join(need))]
    if not facts.engine:
        return [Step(Action.START, name, "start Docker")]
    if facts.swarm == "inactive" and GOSSIP_PORT in facts.listening:
        return [
            Step(Action.START, name, f"restart Docker: an agent of an earlier Swarm still holds port {GOSSIP_PORT}")
        ]
    if facts.live_restore:
        raise Refused(
            "its daemon.json has live-restore, which excludes Swarm",
            host=name,
            step="bootstrap",
            hint='remove "live-restore" there and restart Docker',
        )
    return []


def _mesh(name: str, facts: HostFacts, design: Design) -> list[Step]:
    if design.mesh is None:
        return []
    reasons = []
    if set(design.keys) != set(design.inventory.hosts):
        reasons.append("keys and addresses" if not facts.mesh.config else "a peer is new")
    elif facts.mesh.config != design.mesh_config(name, design.keys):
        reasons.append("configuration")
    elif facts.mesh.address and facts.mesh.peers != {k for n, k in design.keys.items() if n != name}:
        reasons.append("peers of the running tunnel")
    if not facts.mesh.address:
        reasons.append("the tunnel is down")
    if not facts.mesh.guarded:
        reasons.append("the guard is not in force")
    if any(facts.mesh.files.get(path) != digest for path, digest in design.files.items()):
        reasons.append("files")
    units = ("swarmmail-guard", "wg-quick@swarmmail")
    if any(facts.units.get(unit) != ("active", "enabled") for unit in units):
        reasons.append("units")
    if not reasons:
        return []
    address = design.mesh.addresses[name]
    return [Step(Action.MESH, name, f"tunnel {address} ({', '.join(reasons)})")]


def _membership(name: str, facts: HostFacts, design: Design) -> str:
    """``member``, ``none``, or ``lost`` (a state that leaving and joining again repairs)."""
    swarm, inventory = design.observed.swarm, design.inventory
    if facts.swarm == "inactive" or not facts.engine:
        return "none"
    if facts.swarm == "locked":
        raise Refused("its Swarm is locked", host=name, step="bootstrap", hint="docker swarm unlock on that host")
    ours = {design.swarm_address(other) for other in inventory.hosts} | {
        host.advertise for host in inventory.hosts.values()
    }
    node = swarm.nodes.get(facts.node) if swarm is not None else None
    if swarm is not None and facts.is_manager and facts.cluster not in ("", swarm.id):
        raise Refused(
            f"is a manager of another swarm than {swarm.manager}",
            host=name,
            step="bootstrap",
            hint="if nothing there is needed: docker swarm leave --force on that host",
        )
    if node is None or facts.swarm != "active":
        if facts.managers and not set(facts.managers) & ours:
            raise Refused(
                f"belongs to another swarm (managers {', '.join(sorted(facts.managers))})",
                host=name,
                step="bootstrap",
                hint="if nothing there is needed: docker swarm leave --force on that host",
            )
        if swarm is None and facts.is_manager and facts.swarm == "active":
            raise Refused(
                "is a manager of a swarm that does not answer as ours",
                host=name,
                step="bootstrap",
                hint="docker node ls on that host; without a majority of managers nothing can be changed",
            )
        return "lost"
    wanted = design.swarm_address(name)
    if facts.node_address and facts.node_address != wanted:
        raise Refused(
            f"advertises {facts.node_address} to the Swarm, wanted is {wanted} ({design.encryption})",
            host=name,
            step="bootstrap",
            hint="it can't be changed in place: move its services away, docker swarm leave there, run this again",
        )
    return "member"


def _roles(design: Design, chosen: list[str], lead: str) -> list[Step]:
    swarm, steps = design.observed.swarm, []
    current = {
        name: node.role
        for name, facts in design.observed.hosts.items()
        if swarm is not None and (node := swarm.nodes.get(facts.node)) is not None and facts.swarm == "active"
    }
    for name in chosen:
        role = current.get(name)
        if role != "manager" and not (swarm is None and name == lead):
            steps.append(Step(Action.PROMOTE, name, "make it a manager"))
    for name, role in current.items():
        if role == "manager" and name not in chosen:
            steps.append(Step(Action.DEMOTE, name, "make it a worker"))
    return steps


def _ghosts_and_labels(design: Design, rejoin: set[str]) -> list[Step]:
    swarm, steps = design.observed.swarm, []
    for name, facts in design.observed.hosts.items():
        node = swarm.nodes.get(facts.node) if swarm is not None and name not in rejoin else None
        if node is None or node.host != name:
            steps.append(Step(Action.LABEL, name, f"label its node swarmmail.host={name}"))
    if swarm is not None:
        for node in swarm.nodes.values():
            known = node.host or node.hostname
            if (known in design.observed.hosts and node.id != design.observed.hosts[known].node) or (
                known in rejoin and node.state != "ready"
            ):
                steps.append(Step(Action.FORGET, known, f"remove its old node {node.id} from the list", node.id))
    return steps


def _network(design: Design) -> list[Step]:
    wanted, swarm = design.inventory.network, design.observed.swarm
    there = swarm.networks.get(wanted.name) if swarm is not None else None
    if there is None:
        text = f"overlay {wanted.name}, subnet {design.overlay_subnet}, underlay MTU {design.network_mtu}"
        if design.encryption == "ipsec":
            text += ", encrypted"
        return [Step(Action.NETWORK, design.inventory.lead.name, text)]
    problems = []
    if there.driver != "overlay":
        problems.append(f"driver is {there.driver}, wanted overlay")
    if there.encrypted != (design.encryption == "ipsec"):
        problems.append(
            f"it is {'encrypted' if there.encrypted else 'NOT encrypted'} by Docker, wanted: {design.encryption}"
        )
    if wanted.subnet != "auto" and there.subnet != str(wanted.subnet):
        problems.append(f"subnet is {there.subnet}, wanted {wanted.subnet}")
    if there.mtu != str(design.network_mtu):
        problems.append(f"MTU option is {there.mtu or 'missing'}, wanted {design.network_mtu}")
    if not there.attachable:
        problems.append("it is not attachable")
    if there.cluster != design.inventory.cluster:
        problems.append(f"it belongs to {there.cluster or 'nobody'} (label swarmmail.cluster)")
    if problems:
        raise Refused(
            f"overlay {wanted.name} differs: {'; '.join(problems)}",
            host=swarm.manager if swarm else None,
            step="bootstrap",
            hint=f"Docker cannot change a network in place (moby#37901): remove the stack, then "
            f"docker network rm {wanted.name}, then run bootstrap and deploy again; volumes stay",
        )
    return []
