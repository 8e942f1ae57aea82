"""A cluster that exists in memory only: hosts, their tunnels and Docker, and the Swarms they are members of.

It shows itself as the facts that real hosts would give (the states of Docker 26.1 as seen, see
``bootstrap._membership``) and takes the steps of a plan as ``cluster/bootstrap.py`` does them, each in the pieces
between which it can be killed. What must never happen is an ``AssertionError`` here; what a real host would refuse
is a ``Failed``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from builders import PROGRAMS, address, make_facts

from swarmmail.cluster import mesh as mesh_files
from swarmmail.cluster.bootstrap import ROUNDS
from swarmmail.model import bootstrap as model
from swarmmail.model.bootstrap import Design, Observed
from swarmmail.model.errors import Refused
from swarmmail.model.facts import HostFacts, Mesh
from swarmmail.model.inventory import Inventory
from swarmmail.model.mesh import interface_of
from swarmmail.model.plan import Action, Plan, Step
from swarmmail.model.swarm import HOST_LABEL, Network, Node, Swarm

BIND = "manager stopped: failed to listen on remote API address: listen tcp: bind: cannot assign requested address"
UNITS = {"swarmmail-guard": ("active", "enabled"), "wg-quick@swarmmail": ("active", "enabled")}


class Failed(Exception):
    """A step that a real host would have refused: the run ends there."""


@dataclass
class Member:
    """What Docker keeps on a host's disk about its Swarm."""

    swarm: str
    node: str
    """Empty while a join has not got through."""
    address: str
    managers: tuple[str, ...]
    broken: str = ""
    """Why it can never work again (a certificate that is too old)."""


@dataclass
class Machine:
    name: str
    address: str
    esp: bool = False
    programs: set[str] = field(default_factory=lambda: set(PROGRAMS))
    docker: bool = True
    """Docker runs."""
    stale_agent: bool = False
    member: Member | None = None
    deaf: bool = False
    """Docker started when the address was not there on which its Swarm, a manager's, listens."""
    starting: bool = False
    """Docker was started, and the Swarm has not yet been heard."""
    key: str = ""
    config: str = ""
    link: tuple[str, frozenset[str], int] | None = None
    """Address, keys of the peers, MTU of the running tunnel."""
    port: int = 0
    """UDP port that it listens on."""
    heard: dict[str, float | None] = field(default_factory=dict)
    """Host to the seconds since its last answer, where it is not a usual one; None: there never was one."""
    age: float = 4000
    """Seconds since the tunnel was started."""
    guard: bool = False
    files: dict[str, str] = field(default_factory=dict)
    units: dict[str, tuple[str, str]] = field(default_factory=dict)

    def has(self, wanted: str) -> bool:
        return wanted == self.address or (self.link is not None and self.link[0] == wanted)


@dataclass
class Cloud:
    """A Swarm, as its managers' common memory has it."""

    id: str
    cluster: str
    nodes: dict[str, Node] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)


class World:
    """``machines``: those of the inventory; ``others``: machines that it does not name."""

    def __init__(self, inventory: Inventory, machines: list[Machine], others: list[Machine] | None = None) -> None:
        self.inventory = inventory
        self.machines = {machine.name: machine for machine in machines}
        self.others = others or []
        self.clouds: dict[str, Cloud] = {}
        self._numbers = itertools.count(1)

    # -- what is true ----------------------------------------------------------------------------------

    def new_id(self, kind: str) -> str:
        return f"{kind}{next(self._numbers)}"

    def everybody(self) -> Iterator[Machine]:
        yield from self.machines.values()
        yield from self.others

    def holder(self, node: str) -> Machine | None:
        """The machine that is this node, or will be when its Docker runs."""
        return next(
            (m for m in self.everybody() if m.member is not None and m.member.node == node and not m.member.broken),
            None,
        )

    def up(self, node: str) -> bool:
        """The node answers: its machine's Docker runs and listens."""
        machine = self.holder(node)
        if machine is None or machine.member is None:
            return False
        return machine.docker and not machine.deaf and machine.has(machine.member.address)

    def managers(self, cloud: Cloud) -> list[Node]:
        return [node for node in cloud.nodes.values() if node.role == "manager"]

    def has_majority(self, cloud: Cloud) -> bool:
        managers = self.managers(cloud)
        return 2 * sum(self.up(node.id) for node in managers) > len(managers)

    def cloud_of(self, machine: Machine) -> Cloud | None:
        return self.clouds.get(machine.member.swarm) if machine.member is not None else None

    def node_of(self, machine: Machine) -> Node | None:
        cloud = self.cloud_of(machine)
        assert machine.member is None or cloud is not None or machine.member.node == ""
        return cloud.nodes.get(machine.member.node) if cloud is not None and machine.member is not None else None

    def start_docker(self, machine: Machine) -> None:
        """A manager's Swarm listens once, when Docker starts; a worker's connects whenever it can."""
        machine.docker, machine.stale_agent, machine.starting = True, False, True
        node = self.node_of(machine)
        is_manager = node is not None and node.role == "manager"
        machine.deaf = is_manager and machine.member is not None and not machine.has(machine.member.address)

    # -- what is seen ----------------------------------------------------------------------------------

    def facts(self, machine: Machine) -> HostFacts:
        addresses, mtus = {"eth0": (machine.address,)}, {"eth0": 1500}
        if machine.link is not None:
            addresses["swarmmail"], mtus["swarmmail"] = (machine.link[0],), machine.link[2]
        there = machine.docker and "dockerd" in machine.programs
        changes: dict[str, object] = {
            "addresses": addresses,
            "mtus": mtus,
            "routes": tuple(i.network for i in [interface_of(machine.config)] if i is not None and machine.link),
            "esp": machine.esp,
            "programs": frozenset(machine.programs),
            "engine": "26.1.5" if there else "",
            "listening": frozenset({22, *([model.GOSSIP_PORT] if machine.stale_agent else ())}),
            "units": {"docker": ("active" if there else "inactive", "enabled"), **machine.units},
            "mesh": Mesh(
                config=machine.config,
                public_key=machine.key if machine.link or "wg" in machine.programs else "",
                peers=machine.link[1] if machine.link else frozenset(),
                heard={
                    other.key: seconds
                    for name, other in self.machines.items()
                    if other is not machine and (seconds := machine.heard.get(name, 30.0)) is not None
                },
                age=machine.age if machine.link else 0,
                port=machine.port if machine.link else 0,
                address=machine.link[0] if machine.link else "",
                guarded=machine.guard,
                files=dict(machine.files),
            ),
        }
        if there and machine.member is not None:
            changes |= self._membership(machine, machine.member)
        return make_facts(machine.name, hostname=machine.name, **changes)

    def _membership(self, machine: Machine, member: Member) -> dict[str, object]:
        """The Swarm's part of ``docker info``."""
        if member.broken:
            return {"swarm": "error", "swarm_error": member.broken, "node_address": member.address}
        seen: dict[str, object] = {"node": member.node, "node_address": member.address, "managers": member.managers}
        if not member.node:
            return {**seen, "swarm": "pending"}
        cloud, node = self.clouds[member.swarm], self.node_of(machine)
        seen["managers"] = tuple(manager.address for manager in self.managers(cloud))
        if node is not None and node.role == "manager":
            if machine.deaf:
                return {"swarm": "error", "swarm_error": BIND, "node_address": member.address}
            leader = self.has_majority(cloud)
            state = "active" if leader or not machine.starting else "pending"
            return {**seen, "swarm": state, "is_manager": True, "cluster": cloud.id if leader else ""}
        heard = node is not None and self.has_majority(cloud)
        return {**seen, "swarm": "active" if heard or not machine.starting else "pending"}

    def observe(self) -> Observed:
        """As ``cluster.bootstrap.observe``: the first manager that answers is believed."""
        facts = {name: self.facts(machine) for name, machine in self.machines.items()}
        candidates = [n for n in self.inventory.hosts if facts[n].swarm == "active" and facts[n].is_manager]
        for name in candidates:
            cloud = self.cloud_of(self.machines[name])
            assert cloud is not None
            if self.has_majority(cloud):
                return Observed(facts, self.view(cloud, name))
        if candidates and not model.hindered(facts):
            raise Refused("no manager answers for the Swarm", host=candidates[0])
        return Observed(facts, None)

    def view(self, cloud: Cloud, manager: str) -> Swarm:
        nodes = {
            node.id: replace(node, state="ready" if node.state == "late" or self.up(node.id) else "down")
            for node in cloud.nodes.values()
        }
        return Swarm(cloud.id, cloud.cluster, manager, nodes, dict(cloud.networks))

    # -- what is done ----------------------------------------------------------------------------------

    def pieces(self, design: Design, plan: Plan) -> list[Callable[[], None]]:
        """Everything a run does, in order, in pieces."""
        return [piece for step in plan.steps for piece in self._DO[step.action](self, design, step)]

    def settle(self) -> None:
        """Time passes: nodes that are gone are noticed, what was started has found its managers."""
        for cloud in self.clouds.values():
            for node in cloud.nodes.values():
                if node.state == "late":
                    cloud.nodes[node.id] = replace(node, state="ready")
        for machine in self.everybody():
            joined = self.cloud_of(machine)
            if machine.starting and joined is not None and self.has_majority(joined) and self.node_of(machine):
                machine.starting = False

    def _ask(self, design: Design) -> tuple[Cloud, str]:
        """The Swarm that the run's manager manages."""
        there = design.observed.swarm
        name = there.manager if there is not None else model.managers(self.inventory)[0]
        node, cloud = self.node_of(self.machines[name]), self.cloud_of(self.machines[name])
        if node is None or cloud is None or node.role != "manager" or not self.has_majority(cloud):
            raise Failed(f"{name} manages no Swarm")
        return cloud, name

    def _node(self, design: Design, host: str) -> Node:
        machine = self.machines[host]
        cloud, _ = self._ask(design)
        if machine.member is None or machine.member.node not in cloud.nodes:
            raise Failed(f"{host} is no node")
        return cloud.nodes[machine.member.node]

    def _install(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        machine = self.machines[step.host]
        programs = {
            "docker.io": {"docker", "dockerd"},
            "wireguard-tools": {"wg", "wg-quick"},
            "nftables": {"nft"},
            "wireguard-go": {"wireguard-go"},
        }
        for package in step.argument.split():

            def one(package: str = package) -> None:
                machine.programs |= programs[package]
                machine.docker = machine.docker or package == "docker.io"

            yield one

    def _start(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def start() -> None:
            assert "dockerd" in self.machines[step.host].programs, "what is not installed cannot be started"
            self.start_docker(self.machines[step.host])

        yield start

    def _mesh(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        assert design.mesh is not None
        mesh, machine = design.mesh, self.machines[step.host]
        interface = f"{mesh.addresses[step.host]}"

        def make_keys() -> None:
            for name, other in self.machines.items():
                if name not in design.keys and not other.key:
                    if "wg" not in other.programs:
                        raise Failed(f"{name} has no wg")
                    other.key = self.new_id("key")

        def write() -> None:
            keys = {name: other.key for name, other in self.machines.items()}
            machine.config = design.mesh_config(step.host, keys)
            machine.files, machine.guard = dict(design.files), True

        def activate() -> None:
            if not {"wg", "wg-quick", "nft"} <= machine.programs:
                raise Failed(f"{step.host} lacks the programs of the tunnel")
            peers = frozenset(other.key for name, other in self.machines.items() if name != step.host)
            machine.link, machine.units = (interface, peers, mesh.mtu), dict(UNITS)
            machine.port = self.inventory.tunnel_port(step.host) or 40000
            machine.heard = {}  # from another port somebody answers

        yield from (make_keys, write, activate)

    def _leave(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def leave() -> None:
            machine, member = self.machines[step.host], self.machines[step.host].member
            assert member is not None, "leaves what it is not in"
            cloud, node = self.cloud_of(machine), self.node_of(machine)
            assert cloud is None or cloud.cluster == self.inventory.cluster, f"{step.host} leaves a foreign Swarm"
            assert node is None or member.broken, f"{step.host} is a good member, and leaves"
            assert member.managers or member.broken, f"{step.host} leaves a Swarm that nobody knows"
            if not machine.docker:
                raise Failed(f"Docker of {step.host} does not answer")
            machine.member, machine.deaf, machine.starting = None, False, False

        yield leave

    def _init(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def init() -> None:
            machine = self.machines[step.host]
            for other in self.machines.values():
                node = self.node_of(other)
                good = node is not None and node.role == "manager" and other.member and not other.member.broken
                assert not good, f"{other.name} still holds a Swarm, and {step.host} makes a second one"
            where = design.swarm_address(step.host)
            if not machine.docker or machine.stale_agent or not machine.has(where) or machine.member is not None:
                raise Failed(f"no Swarm can be made on {step.host}")
            cloud = Cloud(self.new_id("swarm"), self.inventory.cluster)
            node = Node(self.new_id("node"), step.host, "manager", "ready", "active", where)
            cloud.nodes[node.id] = node
            self.clouds[cloud.id] = cloud
            machine.member = Member(cloud.id, node.id, where, (where,))

        yield init

    def _join(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        machine, where = self.machines[step.host], design.swarm_address(step.host)

        def ask() -> None:
            cloud, manager = self._ask(design)
            if not machine.docker or machine.stale_agent or not machine.has(where):
                raise Failed(f"{step.host} cannot join")
            if machine.member is None:
                machine.member = Member(cloud.id, "", where, (design.swarm_address(manager),))

        def admitted() -> None:
            cloud, _ = self._ask(design)
            member = machine.member
            assert member is not None
            if member.swarm != cloud.id or member.broken:
                raise Failed(f"{step.host} is in another Swarm")
            if not member.node:
                member.node = self.new_id("node")
                cloud.nodes[member.node] = Node(member.node, step.host, "worker", "ready", "active", where)

        yield from (ask, admitted)

    def _role(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def change() -> None:
            node, (cloud, asked) = self._node(design, step.host), self._ask(design)
            role = "manager" if step.action is Action.PROMOTE else "worker"
            rest = [other for other in self.managers(cloud) if other.id != node.id]
            if role == "worker" and node.role == "manager":
                assert 2 * sum(self.up(other.id) for other in rest) > len(rest), "that demotion loses the majority"
            cloud.nodes[node.id] = replace(node, role=role)
            if role == "worker" and step.host == asked:
                raise Failed(f"{asked} does not manage the Swarm any more")

        yield change

    def _forget(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def forget() -> None:
            self._node(design, step.host)  # the host must have joined anew, to take over the labels
            cloud, _ = self._ask(design)
            assert self.holder(step.argument) is None, f"node {step.argument} is alive, and is forgotten"
            cloud.nodes.pop(step.argument, None)

        yield forget

    def _label(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def label() -> None:
            node, (cloud, _) = self._node(design, step.host), self._ask(design)
            cloud.nodes[node.id] = replace(node, labels={**node.labels, HOST_LABEL: step.host})

        yield label

    def _network(self, design: Design, step: Step) -> Iterator[Callable[[], None]]:
        def create() -> None:
            cloud, _ = self._ask(design)
            name = self.inventory.network.name
            cloud.networks.setdefault(name, overlay(design))

        yield create

    _DO: Mapping[Action, Callable[[World, Design, Step], Iterator[Callable[[], None]]]] = {
        Action.INSTALL: _install,
        Action.MESH: _mesh,
        Action.START: _start,
        Action.LEAVE: _leave,
        Action.INIT: _init,
        Action.JOIN: _join,
        Action.PROMOTE: _role,
        Action.FORGET: _forget,
        Action.DEMOTE: _role,
        Action.LABEL: _label,
        Action.NETWORK: _network,
    }


def overlay(design: Design) -> Network:
    """The network as ``overlay.create`` makes it."""
    return Network(
        "network1",
        design.inventory.network.name,
        "overlay",
        design.encryption == "ipsec",
        design.overlay_subnet,
        str(design.network_mtu),
        True,
        design.inventory.cluster,
    )


def decide(world: World) -> tuple[Design, Plan]:
    """As ``cluster.bootstrap.decide``."""
    observed = world.observe()
    design = model.design(world.inventory, observed, {})
    if design.mesh is not None:
        design = model.design(world.inventory, observed, mesh_files.digests(design.mesh))
    return design, model.plan(design)


def run(world: World, kill_after: int | None = None) -> Plan:
    """One ``bootstrap``, killed after so many pieces; the plan that it found last. As ``cluster.bootstrap.run``."""
    plan, left = Plan(), kill_after
    for _ in range(ROUNDS):
        design, plan = decide(world)
        check(world, plan)
        if plan.is_empty:
            break
        try:
            for piece in world.pieces(design, plan):
                if left == 0:
                    return plan
                left = None if left is None else left - 1
                piece()
        except Failed:
            return plan
        world.settle()
    return plan


def check(world: World, plan: Plan) -> None:
    """What holds for every plan."""
    assert all(step.host in world.inventory.hosts for step in plan.steps), "a step for a host that is not named"
    assert list(plan.steps) == sorted(plan.steps, key=lambda step: list(Action).index(step.action))
    assert len(set(plan.steps)) == len(plan.steps), "the same step twice"


def machine_of(inventory: Inventory, name: str, **values: object) -> Machine:
    return Machine(name, inventory.hosts[name].address, **values)  # type: ignore[arg-type]


__all__ = ["BIND", "Cloud", "Failed", "Machine", "Member", "World", "address", "decide", "machine_of", "overlay", "run"]
