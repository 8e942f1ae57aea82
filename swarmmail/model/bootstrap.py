"""What ``bootstrap`` has to do: from the inventory and what was observed, to a plan. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network

from swarmmail.model import esp
from swarmmail.model import mesh as mesh_model
from swarmmail.model import network as net
from swarmmail.model.errors import Refused
from swarmmail.model.facts import MESH, HostFacts
from swarmmail.model.inventory import Inventory
from swarmmail.model.plan import Action, Plan, Step
from swarmmail.model.swarm import Node, Swarm

PACKAGES = ("docker.io",)
GOSSIP_PORT = 7946
"""TCP and UDP; Docker docs, "Getting started with swarm mode"."""
OURS = ("debian", "ubuntu")
NO_ADDRESS = "cannot assign requested address"
"""Docker's words when its Swarm could not listen, as the tunnel was down when Docker started. It stays so until
Docker is restarted (seen with Docker 26.1)."""


def managers(inventory: Inventory) -> list[str]:
    """The hosts that become managers. An even number tolerates no more losses than the odd one below it
    (Docker docs, "Administer and maintain a swarm"), and two stop as soon as either is away: so one less."""
    wanted = [host.name for host in inventory.managers]
    return wanted if len(wanted) % 2 else wanted[:-1]


def silent(hosts: Mapping[str, HostFacts]) -> list[str]:
    """The hosts that have Docker, and it does not answer."""
    return [name for name, facts in hosts.items() if "dockerd" in facts.programs and not facts.engine]


def hindered(hosts: Mapping[str, HostFacts]) -> dict[str, str]:
    """Why managers may miss a host although it is up: host to reason. ``bootstrap`` mends each."""
    found = dict.fromkeys(silent(hosts), "Docker does not answer")
    found |= {
        name: "the tunnel is down" for name, facts in hosts.items() if facts.mesh.config and not facts.mesh.address
    }
    return found


def has_majority(swarm: Swarm, hosts: Mapping[str, HostFacts]) -> bool:
    """Whether more than half of the managers can reach each other, as far as the hosts know: else nothing can be
    changed in the Swarm, although its leader may not have noticed yet (Raft: after an election timeout, 10 s)."""
    managers = [node.host for node in swarm.nodes.values() if node.role == "manager"]
    away = hindered(hosts)
    return 2 * len([host for host in managers if host not in away]) > len(managers)


def will_elect(active: Sequence[str], hosts: Mapping[str, HostFacts]) -> bool:
    """Whether enough managers run to elect a leader: ``active`` ones, and those that have just started and call
    themselves pending. How many there are in all, the active ones know."""
    known = max((len(hosts[name].managers) for name in active), default=0)
    told = {address for name in active for address in hosts[name].managers}
    pending = [
        name for name, facts in hosts.items() if facts.swarm == "pending" and any(facts.link_of(a) for a in told)
    ]
    up = len(active) + len(pending)
    return up <= known < 2 * up


@dataclass(frozen=True)
class Observed:
    """Facts of every host, and the Swarm as a manager of it sees it (None: there is none yet)."""

    hosts: Mapping[str, HostFacts]
    swarm: Swarm | None = None

    @property
    def has_new_leader(self) -> bool:
        """A leader that was just elected has not heard of some node yet: it calls it ``unknown``, and soon ``ready`` or
        ``down`` (moby/swarmkit, manager/dispatcher: markNodesUnknown)."""
        return self.swarm is not None and any(node.state == "unknown" for node in self.swarm.nodes.values())


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
    settings = inventory.network
    chosen = [IPv4Network(subnet) for subnet in (settings.subnet, settings.tunnel_subnet) if subnet != "auto"]
    block = net.free_block(used + chosen)
    other = "choose another, or write network.{}: auto"
    if settings.subnet != "auto" and overlay is None:
        wanted = IPv4Network(settings.subnet)
        _is_free(f"network.subnet {wanted}", wanted, hosts, inventory, [], other.format("subnet"))
    if settings.tunnel_subnet != "auto" and encryption == "wireguard":
        wanted = IPv4Network(settings.tunnel_subnet)
        _is_free(f"network.tunnel_subnet {wanted}", wanted, hosts, inventory, own, other.format("tunnel_subnet"))
    _newcomers_fit(inventory, observed, encryption, own)
    mesh = None
    if encryption == "wireguard":
        nodes = observed.swarm.nodes.values() if observed.swarm else ()
        known = {facts.node for facts in hosts.values()}  # they say themselves where they are
        members = {node.host: node.address for node in nodes if node.host and node.id not in known}
        mesh = mesh_model.design(inventory, hosts, block.tunnel, mtu, members)
    return Design(inventory, observed, encryption, why, block, mtu, mesh, files if mesh else {})


def _is_free(
    what: str,
    wanted: IPv4Network,
    hosts: Mapping[str, HostFacts],
    inventory: Inventory,
    own: list[IPv4Network],
    hint: str,
) -> None:
    for name, facts in hosts.items():
        for used in net.taken([facts], inventory):
            if wanted.overlaps(used) and not any(used.subnet_of(network) for network in own):
                raise Refused(
                    f"{what} overlaps {used}, which this host uses", host=name, step="choose subnets", hint=hint
                )


def _newcomers_fit(inventory: Inventory, observed: Observed, encryption: str, own: list[IPv4Network]) -> None:
    """The subnets that are there were chosen by the hosts of that time: a host that comes later may use them for
    something else, and would lose the way there, or to the mail."""
    if observed.swarm is not None:
        overlay = observed.swarm.networks.get(inventory.network.name)
        stopped = silent(observed.hosts)  # a member, maybe
        joining = {n: f for n, f in observed.hosts.items() if n not in stopped and f.node not in observed.swarm.nodes}
        if overlay is not None and overlay.subnet:
            _is_free(
                f"the overlay's subnet {overlay.subnet}",
                IPv4Network(overlay.subnet),
                joining,
                inventory,
                own,
                "give that up on the host; or remove the stack, docker network rm "
                f"{overlay.name}, and run bootstrap and deploy again: volumes stay",
            )
    bare = {
        name: facts
        for name, facts in observed.hosts.items()
        if not (facts.mesh.config or facts.mesh.address or facts.mesh.public_key or facts.mesh.guarded)
    }
    if encryption == "wireguard" and own and bare:
        _is_free(
            f"the tunnel's subnet {own[0]}",
            own[0],
            bare,
            inventory,
            [],
            "give that up on the host: the tunnel's subnet can't be changed in place",
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
    memberships = {name: _membership(name, facts, design) for name, facts in hosts.items()}
    if mute := silent(hosts):
        # They may be members: to join them anew would take a good node from the Swarm.
        waits.append(f"Docker does not answer on {', '.join(mute)}; when it does, the rest of the plan shows")
    if swarm is not None and not has_majority(swarm, hosts):
        waits.append("too few managers hear each other to change the Swarm; when they do, the rest of the plan shows")
    if waits:
        return Plan(tuple(_in_order(steps)), tuple(notes), tuple(waits), is_partial=True)
    asleep = {name for name, membership in memberships.items() if membership == "asleep"}
    waits += [
        f"{name}: its Swarm is {hosts[name].swarm} ({hosts[name].swarm_error or 'it looks for its managers'}); if it "
        f"stays so, bring the other managers back, or give it up: docker swarm leave --force on {name}"
        for name in sorted(asleep)
        if NO_ADDRESS not in hosts[name].swarm_error  # a restart is planned
    ]
    if swarm is None and asleep:
        # One of them may hold the only copy of our Swarm: nobody leaves, and no other one is made.
        return Plan(tuple(_in_order(steps)), tuple(notes), tuple(waits))
    lead = swarm.manager if swarm is not None else chosen[0]
    rejoin: set[str] = set()
    for name, facts in hosts.items():
        membership = memberships[name]
        if membership == "lost":
            steps.append(
                Step(Action.LEAVE, name, f"leave the half-done membership ({facts.swarm_error or facts.swarm})")
            )
        if membership in ("none", "lost"):
            rejoin.add(name)
            if name == lead and swarm is None:
                steps.append(Step(Action.INIT, name, f"make the Swarm, advertise {design.swarm_address(name)}"))
            else:
                steps.append(Step(Action.JOIN, name, f"join the Swarm, advertise {design.swarm_address(name)}"))
    steps += _roles(design, [name for name in chosen if name not in asleep], lead)
    steps += _labels(design, rejoin | asleep, asleep)
    steps += _network(design)
    if swarm is not None:
        notes += [
            f"node {node.id} ({node.hostname or 'unknown'}, {node.role}) is no host of the inventory and is left "
            f"alone; to remove it: docker swarm leave on it, then docker node rm"
            for node in _strangers(design)
        ]
        for node in swarm.nodes.values():
            owner = _owner(design, node)
            if owner not in hosts or owner in asleep:
                continue
            if node.id == hosts[owner].node:
                if node.state != "ready":
                    waits.append(f"{owner} is {node.state} in the Swarm")
            elif node.state != "ready" or node.address == design.swarm_address(owner):
                steps.append(Step(Action.FORGET, owner, f"remove its old node {node.id} from the list", node.id))
            else:
                waits.append(
                    f"node {node.id} at {node.address} is ready and labelled {owner}, but {owner} is another machine"
                )
        waits += _deaf(design, swarm)
    return Plan(tuple(_in_order(steps)), tuple(notes), tuple(waits))


def _in_order(steps: list[Step]) -> list[Step]:
    order = list(Action)
    return sorted(steps, key=lambda step: order.index(step.action))


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
        steps = [Step(Action.INSTALL, name, f"install {' '.join(need)}", " ".join(need))]
        return steps if "docker.io" in need else steps + _running(name, facts, design)
    return _running(name, facts, design)


def _running(name: str, facts: HostFacts, design: Design) -> list[Step]:
    """Make Docker, which is installed, run so that its Swarm can."""
    if not facts.engine:
        if facts.units.get("docker", ("",))[0] == "active":
            return []  # it runs, but does not answer: a restart would end its tasks, the tunnel may be the reason
        return [Step(Action.START, name, "start Docker")]
    if facts.swarm == "error" and NO_ADDRESS in facts.swarm_error:
        address = facts.node_address
        if not facts.link_of(address) and (design.mesh is None or str(design.mesh.addresses[name]) != address):
            raise Refused(
                f"its Swarm listens on {address or 'an address'} that the host does not have any more",
                host=name,
                step="bootstrap",
                hint="give the host that address again, or give its membership up: docker swarm leave --force there",
            )
        return [Step(Action.START, name, f"restart Docker: its Swarm could not listen on {address}")]
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
    if design.encryption == "ipsec" and facts.esp_came_late:
        # its words would be: "required modules to install IPSEC rules are missing on host"
        return [Step(Action.START, name, "restart Docker: when it was started, the kernel had no IPsec")]
    if lacking := _lacks_of_esp(facts, design):
        return [Step(Action.START, name, f"restart Docker: {lacking} of {design.inventory.network.name} are gone")]
    return []


def _lacks_of_esp(facts: HostFacts, design: Design) -> str:
    """What lacks of Docker's own encryption on a host that has tasks on the overlay. Docker makes it when a network
    gets its first task here, or hears of another host's, and never looks again.

    A firewall's reload or a flush takes the rules away, and everything goes on, in clear text. A kernel without esp4,
    or another program's IPsec that begins with a flush, leaves no states or policies: nothing passes."""
    swarm = design.observed.swarm
    overlay = swarm.networks.get(design.inventory.network.name) if swarm is not None else None
    if overlay is None or not overlay.encrypted or overlay.id[:10] not in facts.overlays:
        return ""
    vni = facts.overlays[overlay.id[:10]]
    if not (esp.marked(facts.esp_rules, vni) and esp.guarded(facts.esp_rules, vni)):
        return "the rules that encrypt packets"
    if facts.esp_peers is None:
        return ""
    lost = facts.overlay_peers.get(overlay.id[:10], frozenset()) - facts.esp_peers
    return f"the ESP states or policies for {', '.join(sorted(lost))}" if lost else ""


def _mesh(name: str, facts: HostFacts, design: Design) -> list[Step]:
    if design.mesh is None:
        return []
    reasons, port = [], design.inventory.tunnel_port(name)
    if set(design.keys) != set(design.inventory.hosts):
        reasons.append("keys and addresses" if not facts.mesh.config else "a peer is new")
    elif facts.mesh.config != design.mesh_config(name, design.keys):
        reasons.append("configuration")
    elif facts.mesh.address and (
        facts.mesh.peers != {k for n, k in design.keys.items() if n != name}
        or facts.mesh.address != str(design.mesh.addresses[name])
        or (0 not in (port, facts.mesh.port) and port != facts.mesh.port)
        or facts.mtus.get(MESH, design.mesh.mtu) != design.mesh.mtu
    ):
        reasons.append("peers, address, port or MTU of the running tunnel")
    if not facts.mesh.address:
        reasons.append("the tunnel is down")
    if not facts.mesh.guarded:
        reasons.append("the guard is not in force")
    if any(facts.mesh.files.get(path) != digest for path, digest in design.files.items()):
        reasons.append("files")
    units = ("swarmmail-guard", "wg-quick@swarmmail")
    if any(facts.units.get(unit) != ("active", "enabled") for unit in units):
        reasons.append("units")
    lost = _lost_by_its_router(name, facts, design)
    reasons += [f"no handshake with {peer} for {seconds:.0f} s: a new port" for peer, seconds in lost.items()]
    if not reasons:
        return []
    address = design.mesh.addresses[name]
    keys = " ".join(design.keys[peer] for peer in lost)
    return [Step(Action.MESH, name, f"tunnel {address} ({', '.join(reasons)})", keys)]


def _lost_by_its_router(name: str, facts: HostFacts, design: Design) -> dict[str, float]:
    """Peers that a host behind NAT calls without an answer, with the seconds for which it has.

    A router that was started anew, or has another address now, may have a mapping that leads nowhere, and the
    keepalive holds it for as long as the host calls from the same port. While a tunnel is younger, there may have been
    nobody yet who could answer."""
    inventory, hosts = design.inventory, design.observed.hosts
    if not inventory.hosts[name].nat:
        return {}

    def silence(peer: str) -> float:
        ages = (facts.mesh.age, hosts[peer].mesh.age)
        return min(facts.mesh.heard.get(design.keys[peer], facts.mesh.age), *ages)

    return {
        peer: seconds
        for peer, spec in inventory.hosts.items()
        if not spec.nat and peer in design.keys and (seconds := silence(peer)) > mesh_model.LOST
    }


def _membership(name: str, facts: HostFacts, design: Design) -> str:
    """How a host stands to the Swarm.

    ``member``; ``none``; ``lost``: leaving and joining again repairs it, and takes nothing away; ``asleep``: it
    is or may be a member that cannot answer yet (it has just started, or too few managers have). To leave would
    then destroy what is to be kept: a manager's copy of the Swarm, at worst the only one.

    What Docker 26.1 says (seen): a join that has not got through is pending without a node id; a member that
    starts is pending with one; a manager without a majority is pending and ``ControlAvailable``; a worker whose
    node was removed stays active, and pending after a restart; an error comes without node id and managers.
    """
    swarm, inventory = design.observed.swarm, design.inventory
    if facts.swarm == "inactive" or not facts.engine:
        return "none"
    if facts.swarm == "locked":
        raise Refused("its Swarm is locked", host=name, step="bootstrap", hint="docker swarm unlock on that host")
    if facts.swarm == "error" and NO_ADDRESS in facts.swarm_error:
        return "asleep"  # until the restart that is planned
    ours = {design.swarm_address(other) for other in inventory.hosts} | {
        host.advertise for host in inventory.hosts.values()
    }
    give_up = "if nothing there is needed: docker swarm leave --force on that host"
    node = swarm.nodes.get(facts.node) if swarm is not None else None
    if swarm is not None and facts.is_manager and (facts.cluster not in ("", swarm.id) or node is None):
        raise Refused(f"is a manager of another swarm than {swarm.manager}", host=name, step="bootstrap", hint=give_up)
    if node is not None and facts.swarm == "active":
        wanted = design.swarm_address(name)
        if facts.node_address and facts.node_address != wanted:
            raise Refused(
                f"advertises {facts.node_address} to the Swarm, wanted is {wanted} ({design.encryption})",
                host=name,
                step="bootstrap",
                hint="it can't be changed in place: move its services away, docker swarm leave there, run this again",
            )
        return "member"
    if node is not None and facts.swarm == "pending":
        return "asleep"
    if facts.swarm == "error":
        nodes = swarm.nodes.values() if swarm is not None else ()
        known = {old.address for old in nodes if _owner(design, old) == name}
        return "lost" if facts.node_address in known else "asleep"
    strange = sorted(set(facts.managers) - ours)
    if strange and len(strange) == len(set(facts.managers)):
        raise Refused(
            f"belongs to another swarm (managers {', '.join(strange)})", host=name, step="bootstrap", hint=give_up
        )
    if swarm is None and (
        strange or (facts.is_manager and (facts.swarm == "pending" or hindered(design.observed.hosts)))
    ):
        return "asleep"
    if swarm is None and facts.is_manager:
        raise Refused(
            "is a manager of a swarm that does not answer as ours",
            host=name,
            step="bootstrap",
            hint="docker node ls on that host; without a majority of managers nothing can be changed",
        )
    return "lost"


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
    if any(node.role == "manager" for node in _strangers(design)):
        return steps  # its end would leave too few: first it goes, then the number is put right
    for name, role in current.items():
        if role == "manager" and name not in managers(design.inventory):
            steps.append(Step(Action.DEMOTE, name, "make it a worker"))
    return steps


def _labels(design: Design, unlabelled: set[str], asleep: set[str]) -> list[Step]:
    swarm, steps = design.observed.swarm, []
    for name, facts in design.observed.hosts.items():
        node = swarm.nodes.get(facts.node) if swarm is not None and name not in unlabelled else None
        if name not in asleep and (node is None or node.host != name):
            steps.append(Step(Action.LABEL, name, f"label its node swarmmail.host={name}"))
    return steps


def _owner(design: Design, node: Node) -> str:
    """The host that a node is or was: by id, else by address, else by label (which may have been set by hand; and
    a host name may be shared, F30)."""
    by_id = {facts.node: name for name, facts in design.observed.hosts.items() if facts.node}
    by_address = {design.swarm_address(name): name for name in design.inventory.hosts}
    return by_id.get(node.id) or by_address.get(node.address) or node.host


def _strangers(design: Design) -> list[Node]:
    nodes = design.observed.swarm.nodes.values() if design.observed.swarm is not None else ()
    return [node for node in nodes if _owner(design, node) not in design.inventory.hosts]


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
    fits = wanted.mtu == "auto" and there.mtu.isdigit() and int(there.mtu) <= design.network_mtu
    if there.mtu != str(design.network_mtu) and not fits:
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
