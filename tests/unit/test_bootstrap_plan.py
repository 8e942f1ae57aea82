"""``model.bootstrap``: what is planned in a given situation, and, on a simulated cluster, that the plans lead home
from wherever a cluster was left, and harm nothing on the way."""

from __future__ import annotations

import copy
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest
from builders import address, make_facts, make_inventory
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from simulator import BIND, UNITS, Cloud, Machine, Member, World, decide, run

from swarmmail.model import bootstrap as model
from swarmmail.model.bootstrap import Observed
from swarmmail.model.errors import Refused
from swarmmail.model.plan import Action, Plan
from swarmmail.model.swarm import HOST_LABEL, Node

ENCRYPTION = {
    "auto with ESP": ("auto", True),
    "auto without ESP": ("auto", False),
    "ipsec": ("ipsec", True),
    "wireguard": ("wireguard", True),
    "none": ("none", False),
}


def fresh(roles: str = "mmm", encryption: str = "auto without ESP", inside: str = "") -> World:
    """Hosts with everything installed, and nothing done. ``inside``: the one behind NAT."""
    asked, esp = ENCRYPTION[encryption]
    inventory = make_inventory(roles, encryption=asked, hosts={inside: {"nat": True}} if inside else None)
    return World(inventory, [Machine(name, host.address, esp) for name, host in inventory.hosts.items()])


def clustered(roles: str = "mmm", encryption: str = "auto without ESP", inside: str = "") -> World:
    world = fresh(roles, encryption, inside)
    run(world)
    assert decide(world)[1].is_done
    return world


# ---- damage, one kind a function ----


class NotPossible(Exception):
    """That cannot be the case here (or would leave nothing to repair: no majority of managers)."""


def stop_docker(world: World, host: Machine) -> None:
    host.docker, host.stale_agent = False, False


def remove_docker(world: World, host: Machine) -> None:
    if host.member is not None:
        raise NotPossible
    host.docker, host.stale_agent, host.programs = False, False, host.programs - {"docker", "dockerd"}


def remove_tools(world: World, host: Machine) -> None:
    if host.link is not None:
        raise NotPossible
    host.programs -= {"wg", "wg-quick", "wireguard-go"}


def remove_nft(world: World, host: Machine) -> None:
    host.programs -= {"nft"}


def lose_key(world: World, host: Machine) -> None:
    host.key, host.link = "", None


def lose_config(world: World, host: Machine) -> None:
    if sum(bool(machine.config) for machine in world.machines.values()) < 2:
        raise NotPossible  # which subnet it was is then known to nobody
    host.config = ""


def change_config(world: World, host: Machine) -> None:
    host.config = host.config.replace("ListenPort", "# ListenPort")


def stop_tunnel(world: World, host: Machine) -> None:
    host.link = None


def old_peers(world: World, host: Machine) -> None:
    if host.link is None:
        raise NotPossible
    host.link = (host.link[0], frozenset({"a key of former times"}), host.link[2])


def old_mtu(world: World, host: Machine) -> None:
    if host.link is None:
        raise NotPossible
    host.link = (host.link[0], host.link[1], host.link[2] + 100)


def old_port(world: World, host: Machine) -> None:
    if host.link is None:
        raise NotPossible
    host.port += 1


def drop_guard(world: World, host: Machine) -> None:
    host.guard = False


def old_files(world: World, host: Machine) -> None:
    host.files = dict.fromkeys(host.files, "a digest of former times")


def lose_files(world: World, host: Machine) -> None:
    host.files = {}


def disable_units(world: World, host: Machine) -> None:
    host.units = dict.fromkeys(UNITS, ("inactive", "disabled"))


def reboot(world: World, host: Machine) -> None:
    world.start_docker(host)


def boot_without_tunnel(world: World, host: Machine) -> None:
    host.link = None
    world.start_docker(host)


def leave(world: World, host: Machine) -> None:
    """Left by force a moment ago: the Swarm has not noticed it yet."""
    node, cloud = world.node_of(host), world.cloud_of(host)
    if node is None or cloud is None:
        raise NotPossible
    cloud.nodes[node.id] = replace(node, state="late")
    host.member, host.deaf, host.starting = None, False, False


def leave_unlabelled(world: World, host: Machine) -> None:
    unlabel(world, host)
    leave(world, host)


def leave_badly(world: World, host: Machine) -> None:
    leave(world, host)
    host.stale_agent = host.docker


def reinstall(world: World, host: Machine) -> None:
    """A new machine at the old address."""
    if host.member is not None:
        leave(world, host)
    world.machines[host.name] = Machine(host.name, host.address, host.esp, programs=set(), docker=False)


def be_removed(world: World, host: Machine) -> None:
    """``docker node rm --force`` on a manager, while the host does not hear it."""
    node, cloud = world.node_of(host), world.cloud_of(host)
    if node is None or cloud is None or (host.member is not None and host.member.broken):
        raise NotPossible
    del cloud.nodes[node.id]


def be_broken(world: World, host: Machine) -> None:
    node = world.node_of(host)
    if node is None or host.member is None or node.labels.get(HOST_LABEL) != host.name:
        raise NotPossible
    host.member.broken, host.deaf = "certificate has expired", False


def half_join(world: World, host: Machine) -> None:
    """A join that did not get through: to the Swarm that is there, or to one that is no more."""
    if host.member is not None or not host.docker:
        raise NotPossible
    lead = world.machines[world.inventory.lead.name]
    managers = [world.machines["host1"], lead]
    host.member = Member("gone", "", host.address, tuple(machine.address for machine in managers))
    host.stale_agent = False


def keep_agent(world: World, host: Machine) -> None:
    if host.member is not None or not host.docker:
        raise NotPossible
    host.stale_agent = True


def unlabel(world: World, host: Machine) -> None:
    node, cloud = world.node_of(host), world.cloud_of(host)
    if node is None or cloud is None:
        raise NotPossible
    cloud.nodes[node.id] = replace(node, labels={})


def mislabel(world: World, host: Machine) -> None:
    node, cloud = world.node_of(host), world.cloud_of(host)
    if node is None or cloud is None:
        raise NotPossible
    cloud.nodes[node.id] = replace(node, labels={HOST_LABEL: "host1"})


def flip_role(world: World, host: Machine) -> None:
    node, cloud = world.node_of(host), world.cloud_of(host)
    if node is None or cloud is None:
        raise NotPossible
    cloud.nodes[node.id] = replace(node, role="worker" if node.role == "manager" else "manager")


def remove_network(world: World, host: Machine) -> None:
    for cloud in world.clouds.values():
        cloud.networks.clear()


def add_stranger(world: World, host: Machine, role: str = "worker") -> None:
    """A machine that the inventory does not name joins by hand; it bears a host name of ours (F30)."""
    cloud = next(iter(world.clouds.values()), None)
    if cloud is None:
        raise NotPossible
    number = 90 + len(world.others)
    stranger = Machine(f"stranger{number}", address(number))
    stranger.member = Member(cloud.id, world.new_id("node"), stranger.address, ())
    world.others.append(stranger)
    cloud.nodes[stranger.member.node] = Node(stranger.member.node, host.name, role, "ready", "active", stranger.address)


def add_strange_manager(world: World, host: Machine) -> None:
    add_stranger(world, host, "manager")


DAMAGE = [
    add_stranger,
    add_strange_manager,
    stop_docker,
    remove_docker,
    remove_tools,
    remove_nft,
    lose_key,
    lose_config,
    change_config,
    stop_tunnel,
    old_peers,
    old_mtu,
    old_port,
    drop_guard,
    old_files,
    lose_files,
    disable_units,
    reboot,
    boot_without_tunnel,
    leave,
    leave_unlabelled,
    leave_badly,
    reinstall,
    be_removed,
    be_broken,
    half_join,
    keep_agent,
    unlabel,
    mislabel,
    flip_role,
    remove_network,
]


def is_repairable(world: World) -> bool:
    """A majority of each Swarm's managers will answer when their Docker and their tunnel run, and we know one."""
    for cloud in world.clouds.values():
        managers = world.managers(cloud)
        holders = [holder for node in managers if (holder := world.holder(node.id)) is not None]
        if 2 * len(holders) <= len(managers) or not any(holder.name in world.machines for holder in holders):
            return False
    return True


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Hosts on which nothing, something or all was done, and then something went wrong."""
    roles = draw(st.text("mw", min_size=1, max_size=5).filter(lambda text: "m" in text))
    world = fresh(roles, draw(st.sampled_from(sorted(ENCRYPTION))))
    begun = draw(st.sampled_from(["nothing", "killed", "all"]))
    if begun != "nothing":
        run(world, draw(st.integers(0, 25)) if begun == "killed" else None)
    note(f"{roles} {world.inventory.network.encryption}, done before: {begun}")
    for kind, number in draw(st.lists(st.tuples(st.sampled_from(DAMAGE), st.integers(1, len(roles))), max_size=6)):
        before = copy.deepcopy(world.__dict__)
        try:
            kind(world, world.machines[f"host{number}"])
        except NotPossible:
            world.__dict__.update(before)
            continue
        if is_repairable(world):
            note(f"{kind.__name__} host{number}")
        else:
            world.__dict__.update(before)
    return world


def operator_helps(world: World) -> None:
    """What the message asks for when too few managers answer: bring the missing ones back."""
    for machine in world.machines.values():
        if machine.member is not None and world.node_of(machine) is not None and not machine.member.broken:
            if machine.config or machine.link:
                machine.link = (machine.member.address, frozenset(), 1420)
            world.start_docker(machine)
    world.settle()


def once(world: World, kill_after: int | None = None) -> Plan | None:
    try:
        return run(world, kill_after)
    except Refused as refusal:
        if "no manager answers" not in str(refusal):
            raise
        note(str(refusal))
        operator_helps(world)
        return None


def is_home(world: World) -> None:
    """The wanted state, judged by what is, and not by what is planned."""
    chosen = model.managers(world.inventory)
    cloud = world.cloud_of(world.machines[chosen[0]])
    assert cloud is not None
    assert {machine.member.swarm for machine in world.everybody() if machine.member} == {cloud.id}
    assert all(world.up(node) for node in cloud.nodes)
    assert len(cloud.nodes) == len(list(world.everybody())), "nobody is missing, and no ghost is left"
    strangers = {machine.member.node for machine in world.others if machine.member}
    roles = {node.labels[HOST_LABEL]: node.role for node in cloud.nodes.values() if node.id not in strangers}
    assert set(roles) == set(world.machines)
    managers = {name for name, role in roles.items() if role == "manager"}
    if any(cloud.nodes[node].role == "manager" for node in strangers):
        assert managers >= set(chosen)
    else:
        assert managers == set(chosen)
        assert len(managers) % 2 == 1
    assert world.inventory.network.name in cloud.networks


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds(), st.lists(st.integers(0, 30), max_size=3))
def test_from_anywhere_it_gets_home_and_harms_nothing(world: World, kills: list[int]) -> None:
    for kill_after in kills:
        note(f"a run, killed after {kill_after}")
        once(world, kill_after)
        world.settle()
    for _ in range(3):
        plan = once(world)
        note(f"a run: {[(str(s.action), s.host) for s in plan.steps] if plan else 'refused'}, {plan and plan.waits}")
        if plan is not None and plan.is_done:
            break
    else:
        raise AssertionError("it does not end")
    is_home(world)
    assert decide(world)[1] == plan


def foreign_manager(world: World, host: Machine) -> None:
    """The host manages a Swarm of somebody else, alone."""
    foreign = Cloud("foreign", "theirs")
    node = Node("theirs1", host.name, "manager", "ready", "active", host.address)
    foreign.nodes[node.id] = node
    world.clouds[foreign.id] = foreign
    host.member = Member(foreign.id, node.id, host.address, (host.address,))


def foreign_worker(world: World, host: Machine) -> None:
    """The host works in a Swarm whose only manager is a machine that we do not know."""
    foreign_manager(world, Machine("theirs", address(99)))
    node = Node("theirs2", host.name, "worker", "ready", "active", host.address)
    world.clouds["foreign"].nodes[node.id] = node
    host.member = Member("foreign", node.id, host.address, (address(99),))
    world.others.append(Machine("theirs", address(99), member=Member("foreign", "theirs1", address(99), ())))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    worlds(),
    st.integers(1, 5),
    st.sampled_from([foreign_manager, foreign_worker]),
    st.lists(st.sampled_from([stop_docker, reboot, be_broken, "deaf"]), max_size=1),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_a_foreign_swarm_is_left_alone(world, number, kind, states, kills) -> None:  # type: ignore[no-untyped-def]
    host = world.machines[f"host{min(number, len(world.machines))}"]
    host.programs |= {"docker", "dockerd"}
    host.docker, host.deaf, host.starting, host.stale_agent = True, False, False, False
    kind(world, host)
    for state in states:
        if state is be_broken:
            # Docker then says nothing of its Swarm but the address: it must not be one that ours knows this host by
            ours = [cloud for cloud in world.clouds.values() if cloud.id != "foreign"]
            assume(all(node.address != host.address for cloud in ours for node in cloud.nodes.values()))
            host.member.broken = "certificate has expired"
        elif state == "deaf":
            host.deaf = True
        else:
            state(world, host)
    before = copy.deepcopy((host.member, world.clouds["foreign"]))
    for kill_after in [*kills, None, None]:
        try:
            assert not run(world, kill_after).is_done
        except Refused as refusal:
            note(str(refusal))
        world.settle()
    assert (host.member, world.clouds["foreign"]) == before


# ---- single situations ----


def steps(world: World) -> list[tuple[str, str]]:
    return [(str(step.action), step.host) for step in decide(world)[1].steps]


def ghost(world: World, host: str, **changes: Any) -> Node:
    """Add a node that is not what a host is now."""
    cloud = next(iter(world.clouds.values()))
    values = {"hostname": host, "role": "worker", "state": "down", "address": "198.18.0.77", "labels": {}}
    node = Node(world.new_id("ghost"), availability="active", **values | changes)
    cloud.nodes[node.id] = node
    return node


def test_a_first_run_in_its_order() -> None:
    world = fresh("mmw", "auto with ESP")
    world.machines["host3"].programs = set()
    world.machines["host3"].docker = False
    assert steps(world) == [
        ("install", "host3"),
        ("init", "host1"),
        ("join", "host2"),
        ("join", "host3"),
        ("label", "host1"),
        ("label", "host2"),
        ("label", "host3"),
        ("network", "host1"),
    ]


def test_the_tunnel_comes_before_docker_which_listens_on_it() -> None:
    world = clustered()
    boot_without_tunnel(world, world.machines["host2"])
    assert world.facts(world.machines["host2"]).swarm_error == BIND
    assert steps(world) == [("mesh", "host2"), ("start", "host2")]


@pytest.mark.parametrize(
    ("roles", "chosen"), [("m", 1), ("mm", 1), ("mmm", 3), ("mmmm", 3), ("wmwmm", 3), ("mmmmm", 5)]
)
def test_the_number_of_managers_is_odd(roles: str, chosen: int) -> None:
    names = model.managers(make_inventory(roles))
    assert len(names) == chosen
    assert names == [f"host{i}" for i, role in enumerate(roles, 1) if role == "m"][:chosen]


def test_two_managers_become_one_and_it_is_said_why() -> None:
    plan = decide(fresh("mm"))[1]
    assert not plan.of(Action.PROMOTE)
    assert any("host2 stays a worker: 2 managers tolerate no more losses than 1" in text for text in plan.notes)


@pytest.mark.parametrize("encryption", sorted(ENCRYPTION))
def test_hosts_that_boot_all_at_once_keep_their_swarm(encryption: str) -> None:
    world = clustered(encryption=encryption)
    for machine in world.machines.values():
        world.start_docker(machine)
    for machine in world.machines.values():  # the managers have not found each other yet
        machine.deaf = False
    facts = {
        name: replace(world.facts(machine), swarm="pending", cluster="") for name, machine in world.machines.items()
    }
    design = model.design(world.inventory, model.Observed(facts), dict(world.machines["host1"].files))
    plan = model.plan(design)
    assert plan.steps == ()
    assert not plan.is_done
    assert [text.partition(":")[0] for text in plan.waits] == ["host1", "host2", "host3"]


@pytest.mark.parametrize("host", ["host2", "host3"])
def test_a_member_that_starts_is_waited_for(host: str) -> None:
    """A manager or a worker: leaving would end its tasks, and cost the manager's vote."""
    world = clustered("mmwm", "ipsec")
    observed = world.observe()
    assert observed.swarm is not None
    id_ = observed.hosts[host].node
    nodes = {**observed.swarm.nodes, id_: replace(observed.swarm.nodes[id_], state="down")}
    facts = {**observed.hosts, host: replace(observed.hosts[host], swarm="pending", peers=None)}
    seen = model.Observed(facts, replace(observed.swarm, nodes=nodes))
    plan = model.plan(model.design(world.inventory, seen, {}))
    assert plan.steps == ()
    assert plan.waits[0].startswith(f"{host}: its Swarm is pending")


def test_a_lost_manager_is_forgotten_before_another_one_is_demoted() -> None:
    """Three managers, one of them lost: as long as it counts, Docker lets none of the others go."""
    world = clustered("mmm", "ipsec")
    leave(world, world.machines["host3"])
    world.settle()
    world.inventory = make_inventory("mww", encryption="ipsec")
    assert steps(world) == [("join", "host3"), ("forget", "host3"), ("demote", "host2"), ("label", "host3")]
    run(world)
    assert decide(world)[1].is_done


def test_the_only_managers_tunnel_was_down_when_it_booted() -> None:
    world = clustered("mww")
    boot_without_tunnel(world, world.machines["host1"])
    assert steps(world) == [("mesh", "host1"), ("start", "host1")]
    cloud = world.cloud_of(world.machines["host1"])
    run(world)
    assert decide(world)[1].is_done
    assert world.cloud_of(world.machines["host1"]) is cloud


def test_a_swarm_that_listens_on_an_address_that_is_gone_is_refused() -> None:
    world = clustered("mww", "ipsec")
    host = world.machines["host1"]
    host.deaf, host.member = True, replace(host.member, address="198.18.0.200")  # type: ignore[type-var]
    with pytest.raises(Refused, match=r"host1.*listens on 198\.18\.0\.200 that the host does not have"):
        decide(world)


def test_a_failed_swarm_of_unknown_kind_is_never_left() -> None:
    world = clustered()
    host = world.machines["host3"]
    be_removed(world, host)
    assert host.member is not None
    host.member.broken = "certificate has expired"
    plan = decide(world)[1]
    assert plan.steps == ()
    assert "certificate has expired" in plan.waits[0]
    assert "docker swarm leave --force on host3" in plan.waits[0]


def test_a_join_that_did_not_get_through_is_done_again() -> None:
    world = clustered("mww", "ipsec")
    leave(world, world.machines["host3"])
    half_join(world, world.machines["host3"])
    assert steps(world) == [("leave", "host3"), ("join", "host3"), ("forget", "host3"), ("label", "host3")]


def test_a_node_that_is_ready_and_another_machine_is_not_forgotten() -> None:
    """host2 was replaced in the inventory, and the old machine is still at work."""
    world = clustered(encryption="ipsec")
    old = ghost(world, "host2", state="late", labels={HOST_LABEL: "host2"})
    plan = decide(world)[1]
    assert plan.steps == ()
    assert plan.waits == (f"node {old.id} at 198.18.0.77 is ready and labelled host2, but host2 is another machine",)
    world.settle()  # it is switched off
    assert [(step.action, step.argument) for step in decide(world)[1].steps] == [(Action.FORGET, old.id)]


@pytest.mark.parametrize("state", ["late", "down"])
def test_a_host_name_of_ours_makes_no_node_ours(state: str) -> None:
    world = clustered(encryption="ipsec")
    old = ghost(world, "host2", state=state)
    plan = decide(world)[1]
    assert plan.is_done
    assert any(old.id in text and "left alone" in text for text in plan.notes)


def test_no_manager_is_demoted_while_one_outside_of_the_inventory_counts() -> None:
    """host3 was taken out of the inventory: host1 alone could not go on when it is switched off."""
    three = clustered("mmm", "ipsec")
    two = World(make_inventory("mm", encryption="ipsec"), [three.machines["host1"], three.machines["host2"]])
    two.clouds, two.others = three.clouds, [three.machines["host3"]]
    plan = decide(two)[1]
    assert plan.is_done
    assert any("host3, manager" in text and "docker node rm" in text for text in plan.notes)
    (cloud,) = two.clouds.values()
    gone = two.others.pop().member
    assert gone is not None
    del cloud.nodes[gone.node]
    assert steps(two) == [("demote", "host2")]


def test_a_host_whose_docker_is_silent_hides_the_rest_of_the_plan() -> None:
    world = clustered()
    stop_docker(world, world.machines["host2"])
    plan = decide(world)[1]
    assert [(step.action, step.host) for step in plan.steps] == [(Action.START, "host2")]
    assert plan.is_partial
    assert not plan.is_done


@pytest.mark.parametrize(("cut", "whole"), [((), True), (("host3",), True), (("host2", "host3"), False)])
def test_what_only_a_majority_can_do_is_not_planned_for_a_leader_that_is_left_alone(
    cut: tuple[str, ...], whole: bool
) -> None:
    """It answers for some seconds more."""
    world = clustered(encryption="wireguard")
    seen = world.observe()
    assert seen.swarm is not None
    facts = {
        name: replace(one, mesh=replace(one.mesh, address="")) if name in cut else one
        for name, one in seen.hosts.items()
    }
    observed = Observed(facts, replace(seen.swarm, networks={}))  # the overlay is to be made anew
    done = model.plan(model.design(world.inventory, observed, {}))
    assert bool(done.of(Action.NETWORK)) is whole
    assert done.is_partial is not whole
    assert [step.host for step in done.of(Action.MESH) if step.host in cut] == list(cut)


@pytest.mark.parametrize("stopped", [("host2", "host3"), ("host1", "host3"), ("host1", "host2", "host3")])
@pytest.mark.parametrize("encryption", ["ipsec", "wireguard"])
def test_managers_whose_docker_is_stopped_are_started_also_when_no_majority_is_left(
    encryption: str, stopped: tuple[str, ...]
) -> None:
    world = clustered(encryption=encryption)
    for name in stopped:
        stop_docker(world, world.machines[name])
    plan = decide(world)[1]
    assert [(step.action, step.host) for step in plan.steps] == [(Action.START, name) for name in stopped]
    assert plan.is_partial
    run(world)
    assert decide(world)[1].is_done
    assert len(world.clouds) == 1


@pytest.mark.parametrize("cut", [("host2", "host3"), ("host1", "host2", "host3")])
def test_tunnels_that_are_down_are_started_also_when_no_majority_is_left(cut: tuple[str, ...]) -> None:
    world = clustered(encryption="wireguard")
    for name in cut:
        world.machines[name].link = None
    plan = decide(world)[1]
    assert [(step.action, step.host) for step in plan.steps] == [(Action.MESH, name) for name in cut]
    assert not plan.is_done
    run(world)
    assert decide(world)[1].is_done
    assert len(world.clouds) == 1


def test_docker_is_started_also_where_something_else_has_to_be_installed() -> None:
    world = fresh()
    stop_docker(world, world.machines["host2"])
    remove_tools(world, world.machines["host2"])
    found = decide(world)[1]
    assert ("install", "host2") in steps(world)
    assert ("start", "host2") in steps(world)
    assert found.of(Action.INSTALL)[0].argument == "wireguard-tools wireguard-go"


def test_an_active_docker_that_does_not_answer_is_not_restarted() -> None:
    inventory = make_inventory("m", encryption="ipsec")
    facts = {"host1": make_facts("host1", engine="", units={"docker": ("active", "enabled")})}
    plan = model.plan(model.design(inventory, model.Observed(facts), {}))
    assert plan.steps == ()
    assert plan.is_partial


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"os": "fedora", "os_name": "Fedora 42", "programs": frozenset()}, "lacks docker.io, and Fedora 42 is not"),
        ({"systemd": False, "programs": frozenset()}, "lacks docker.io"),
        ({"live_restore": True}, "live-restore"),
        ({"swarm": "locked"}, "docker swarm unlock"),
        ({"swarm": "active", "node": "x", "managers": ("192.0.2.1",)}, "belongs to another swarm (managers 192.0.2.1)"),
        ({"swarm": "active", "node": "x", "is_manager": True}, "is a manager of a swarm that does not answer as ours"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    inventory = make_inventory("m", encryption="ipsec")
    with pytest.raises(Refused) as refused:
        model.plan(model.design(inventory, model.Observed({"host1": make_facts("host1", **changes)}), {}))
    assert words in str(refused.value)
    assert refused.value.host == "host1"


def test_a_derivative_of_debian_is_installed_on() -> None:
    inventory = make_inventory("m", encryption="ipsec")
    facts = make_facts("host1", os="linuxmint", os_like=("ubuntu", "debian"), programs=frozenset(), engine="")
    plan = model.plan(model.design(inventory, model.Observed({"host1": facts}), {}))
    assert plan.of(Action.INSTALL)[0].argument == "docker.io"


@pytest.mark.parametrize("docker", [True, False])
@pytest.mark.parametrize(
    ("encryption", "uses", "words"),
    [
        (
            "ipsec",
            {"routes": (IPv4Network("10.90.1.0/25"),)},
            r"the overlay's subnet 10\.90\.1\.0/24 overlaps 10\.90\.1",
        ),
        ("ipsec", {"resolvers": ("10.90.1.53",)}, r"the overlay's subnet 10\.90\.1\.0/24 overlaps 10\.90\.1\.53/32"),
        ("ipsec", {"routes": (IPv4Network("10.90.0.0/24"),)}, None),
        ("wireguard", {"routes": (IPv4Network("10.90.0.128/25"),)}, r"the tunnel's subnet 10\.90\.0\.0/24 overlaps"),
        ("wireguard", {"resolvers": ("10.90.0.1",)}, r"the tunnel's subnet 10\.90\.0\.0/24 overlaps 10\.90\.0\.1/32"),
        ("wireguard", {"routes": (IPv4Network("10.91.0.0/16"),)}, None),
    ],
)
def test_a_host_that_comes_later_must_not_use_the_subnets_that_are_there(
    docker: bool, encryption: str, uses: dict[str, Any], words: str | None
) -> None:
    world = clustered("mmw", encryption=encryption)
    reinstall(world, world.machines["host3"])
    world.settle()
    observed = world.observe()
    new = replace(make_facts("host3", esp=True, **uses), engine="26.1.5" if docker else "")
    if not docker:
        new = replace(new, programs=frozenset())
    seen = replace(observed, hosts={**observed.hosts, "host3": new})
    if words is None:
        assert not model.plan(model.design(world.inventory, seen, {})).is_done
        return
    with pytest.raises(Refused, match=rf"host3, choose subnets: {words}.* -> give that up on the host"):
        model.design(world.inventory, seen, {})


def test_a_member_may_route_by_the_subnets_that_are_there() -> None:
    world = clustered("mmw", encryption="wireguard")
    observed = world.observe()
    old = replace(observed.hosts["host3"], routes=(IPv4Network("10.90.1.0/24"),))
    seen = replace(observed, hosts={**observed.hosts, "host3": old})
    model.design(world.inventory, seen, {})


def test_a_swarm_of_somebody_else_is_refused() -> None:
    world = clustered(encryption="ipsec")
    for cloud in world.clouds.values():
        cloud.cluster = ""
    with pytest.raises(Refused, match="manager of a swarm of somebody else, not of lab"):
        decide(world)


def test_two_swarms_of_ours_are_refused() -> None:
    world = clustered("mw", "ipsec")
    leave(world, world.machines["host2"])
    foreign_manager(world, world.machines["host2"])
    world.clouds["foreign"].cluster = "lab"
    with pytest.raises(Refused, match=r"host2.*is a manager of another swarm than host1"):
        decide(world)


def test_an_address_that_cannot_be_changed_in_place_is_refused() -> None:
    world = clustered("mw", "ipsec")
    host = world.machines["host2"]
    host.member = replace(host.member, address="198.18.0.200")  # type: ignore[type-var]
    with pytest.raises(Refused, match=r"host2.*advertises 198\.18\.0\.200 to the Swarm, wanted is 198\.18\.0\.12"):
        decide(world)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"driver": "bridge"}, "driver is bridge"),
        ({"encrypted": False}, "NOT encrypted"),
        ({"subnet": "10.77.0.0/24"}, "subnet is 10.77.0.0/24, wanted 10.91.0.0/24"),
        ({"mtu": "9000"}, "MTU option is 9000, wanted 1500"),
        ({"mtu": ""}, "MTU option is missing"),
        ({"attachable": False}, "not attachable"),
        ({"cluster": ""}, "belongs to nobody"),
        ({"mtu": "1400"}, None),
    ],
)
def test_an_overlay_that_differs_is_refused(changes: dict[str, Any], words: str | None) -> None:
    """A smaller MTU does no harm: links may have grown since."""
    inventory = make_inventory("m", encryption="ipsec", subnet="10.91.0.0/24")
    world = World(inventory, [Machine("host1", address(1), esp=True)])
    run(world)
    (cloud,) = world.clouds.values()
    (network,) = cloud.networks.values()
    cloud.networks = {network.name: replace(network, **changes)}
    if words is None:
        assert decide(world)[1].is_done
    else:
        with pytest.raises(Refused, match="docker network rm") as refused:
            decide(world)
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lose_config, "configuration"),
        (change_config, "configuration"),
        (stop_tunnel, "the tunnel is down"),
        (old_peers, "peers, address, port or MTU of the running tunnel"),
        (old_mtu, "peers, address, port or MTU of the running tunnel"),
        (old_port, "peers, address, port or MTU of the running tunnel"),
        (drop_guard, "the guard is not in force"),
        (old_files, "files"),
        (disable_units, "units"),
    ],
)
def test_what_is_wrong_with_a_tunnel_is_said(damage: Any, reason: str) -> None:
    world = clustered()
    damage(world, world.machines["host2"])
    (step,) = decide(world)[1].steps
    assert step.text == f"tunnel 10.90.0.2 ({reason})"


@pytest.mark.parametrize(("heard", "seconds"), [(400.0, 400), (None, 4000)])
def test_whom_its_router_leads_nowhere_calls_from_another_port(heard: float | None, seconds: int) -> None:
    world = clustered(inside="host3")
    world.machines["host3"].heard = {"host1": 150.0, "host2": heard}
    (step,) = decide(world)[1].steps
    assert (step.action, step.host) == (Action.MESH, "host3")
    assert step.text == f"tunnel 10.90.0.3 (no handshake with host2 for {seconds} s: a new port)"
    assert step.argument == world.machines["host2"].key
    run(world)
    assert decide(world)[1].is_done


@pytest.mark.parametrize(
    ("name", "peer", "young"),
    [
        ("host3", "host2", "host3"),  # it has only just been started
        ("host3", "host2", "host2"),
        ("host1", "host2", ""),  # to host2 it finds the way without a mapping
        ("host2", "host3", ""),  # it can't call
    ],
)
def test_who_may_not_have_been_heard_yet_or_is_called_keeps_its_port(name: str, peer: str, young: str) -> None:
    for silence in (400.0, None):
        world = clustered(inside="host3")
        world.machines[name].heard = {peer: silence}
        if young:
            world.machines[young].age = 100
        assert decide(world)[1].is_done


def test_a_peer_whose_tunnel_is_down_is_none_that_a_router_lost() -> None:
    world = clustered(inside="host3")
    world.machines["host3"].heard = {"host2": 400.0}
    world.machines["host2"].link = None
    assert steps(world) == [("mesh", "host2")]


def test_a_running_tunnel_with_an_old_address_is_mended() -> None:
    world = clustered("mw")
    host = world.machines["host2"]
    assert host.link is not None
    leave(world, host)
    host.link = ("10.90.0.9", *host.link[1:])
    assert ("mesh", "host2") in steps(world)


def test_who_does_not_hear_the_others_is_waited_for() -> None:
    world = clustered(encryption="ipsec")
    observed = world.observe()
    everybody = frozenset(machine.address for machine in world.machines.values())
    facts = {name: replace(found, peers=everybody) for name, found in observed.hosts.items()}
    assert model.plan(model.design(world.inventory, replace(observed, hosts=facts), {})).is_done
    facts["host2"] = replace(facts["host2"], peers=frozenset({address(2), address(3)}))
    plan = model.plan(model.design(world.inventory, replace(observed, hosts=facts), {}))
    assert plan.waits[0].startswith("host2 does not hear host1 by gossip")
    assert not plan.is_done


def test_rules_that_encrypt_the_overlay_are_put_back() -> None:
    """Flushed, everything works on, in clear text; Docker makes them anew only when it starts."""
    world = clustered("mww", "ipsec")
    observed = world.observe()
    assert observed.swarm is not None
    [overlay] = [network for network in observed.swarm.networks.values() if network.encrypted]
    mark = '-A OUTPUT -p udp --dport 4789 -m bpf --bytecode "...,21 1 0 4097,..." -j MARK --set-xmark 0xd0c4e3'
    drop = '-A INPUT -p udp --dport 4789 -m bpf --bytecode "...,21 1 0 4097,..." -m policy --pol none -j DROP'

    def planned(**changes: Any) -> list[tuple[str, str]]:
        hosts = {**observed.hosts, "host2": replace(observed.hosts["host2"], **changes)}
        seen = model.Observed(hosts, observed.swarm)
        return [(step.action, step.host) for step in model.plan(model.design(world.inventory, seen, {})).steps]

    here = {overlay.id[:10]: 4097}
    assert planned(overlays=here, esp_rules=(mark, drop)) == []
    assert planned(esp_rules=()) == []  # no task of it here, so no rules
    for left in ((), (mark,), (drop,)):
        assert planned(overlays=here, esp_rules=left) == [("start", "host2")]
    # its kernel was without esp4, or another program has flushed what Docker told it
    rest = {"overlays": here, "esp_rules": (mark, drop), "overlay_peers": {overlay.id[:10]: frozenset({address(1)})}}
    for peers, steps in ((None, []), (frozenset({address(1)}), []), (frozenset(), [("start", "host2")])):
        assert planned(**rest, esp_peers=peers) == steps
    with pytest.raises(Refused, match="does not accept an ESP state"):  # it would be in vain
        planned(**rest, esp_peers=frozenset(), esp=False)
    # a module came after Docker had started: it would refuse each task there
    assert planned(docker_esp=True) == planned(docker_esp=None) == []
    assert planned(docker_esp=False) == [("start", "host2")]
    assert planned(docker_esp=False, overlays=here, esp_rules=(mark, drop)) == []  # it has them: never in vain
