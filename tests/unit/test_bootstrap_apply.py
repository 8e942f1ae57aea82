"""``cluster.bootstrap``: how a plan is carried out. The hosts, and what is done on them, are recorders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from builders import address, make_facts, make_inventory
from simulator import Machine, World
from simulator import run as simulate

from swarmmail.cluster import bootstrap
from swarmmail.cluster import swarm as swarm_work
from swarmmail.model import bootstrap as model
from swarmmail.model import findings
from swarmmail.model.bootstrap import Observed
from swarmmail.model.errors import HostError, Refused, SwarmmailError
from swarmmail.model.plan import Action, Plan, Step
from swarmmail.model.swarm import HOST_LABEL, Node, Swarm


class Fleet:
    """An inventory, and hosts that are their names."""

    def __init__(self, roles: str = "mmm", **network: Any) -> None:
        self.inventory = make_inventory(roles, **network)

    def __getitem__(self, name: str) -> str:
        return name


def everything() -> Plan:
    return Plan(tuple(Step(action, f"host{i}", str(action)) for action in reversed(Action) for i in (1, 2)))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Action]:
    """The actions that were carried out."""
    order: list[Action] = []

    def phase(action: Action) -> Any:
        def work(fleet: Fleet, design: object, steps: tuple[Step, ...], joined: object) -> None:
            assert [step.action for step in steps] == [action, action]
            order.append(action)

        return work

    monkeypatch.setattr(bootstrap, "_PHASES", {action: phase(action) for action in Action})
    return order


FIRST = [Action.INSTALL, Action.MESH, Action.START, Action.LEAVE, Action.INIT, Action.JOIN]


def test_every_action_can_be_done() -> None:
    assert set(bootstrap._PHASES) == set(Action)


def test_hosts_have_joined_before_they_are_told_apart(done: list[Action]) -> None:
    bootstrap.apply(Fleet(), None, everything())  # type: ignore[arg-type]
    assert done[: len(FIRST)] == FIRST
    assert set(done[len(FIRST) :]) == set(Action) - set(FIRST)
    assert len(done) == len(Action)


def test_lost_managers_are_forgotten_before_others_are_demoted(done: list[Action]) -> None:
    bootstrap.apply(Fleet(), None, everything())  # type: ignore[arg-type]
    assert done.index(Action.PROMOTE) < done.index(Action.FORGET) < done.index(Action.DEMOTE)


@pytest.mark.parametrize("broken", list(Action))
def test_a_failure_is_raised_and_ends_what_builds_on_it(
    done: list[Action], monkeypatch: pytest.MonkeyPatch, broken: Action
) -> None:
    def fail(*_: object) -> None:
        raise HostError("no", host="host1", step=str(broken))

    monkeypatch.setitem(bootstrap._PHASES, broken, fail)
    with pytest.raises(HostError, match=f"host1, {broken}: no"):
        bootstrap.apply(Fleet(), None, everything())  # type: ignore[arg-type]
    if broken in FIRST:
        assert done == FIRST[: FIRST.index(broken)]
    else:
        assert set(done) >= set(FIRST)


# ---- the rounds of a run ----


class Rounds:
    """What is observed, in turn, and what was applied."""

    def __init__(self, *plans: Plan) -> None:
        self.plans = list(plans)
        self.applied: list[Plan] = []

    def decide(self, *_: object) -> tuple[None, Plan]:
        return None, self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Any:
    def play(*plans: Plan, preflight: bool = False) -> tuple[bool, Rounds]:
        played = Rounds(*plans)

        @contextlib.contextmanager
        def locked(*_: object) -> Iterator[None]:
            yield

        monkeypatch.setattr(bootstrap, "decide", played.decide)
        monkeypatch.setattr(bootstrap, "observe", lambda fleet: Observed({}))
        monkeypatch.setattr(bootstrap, "_refresh", lambda fleet, before: Observed({}))
        monkeypatch.setattr(bootstrap, "_locked", locked)
        monkeypatch.setattr(bootstrap, "SETTLE", 0.1)
        monkeypatch.setattr(bootstrap, "QUIET", 0.1)
        monkeypatch.setattr(bootstrap, "apply", lambda fleet, design, plan: played.applied.append(plan))
        return bootstrap.run(Fleet(), preflight), played  # type: ignore[arg-type]

    return play


WORK = Plan((Step(Action.START, "host1", "start Docker"),))
MORE = Plan((Step(Action.JOIN, "host1", "join"),))
WAIT = Plan(waits=("host1 is down in the Swarm",))


def test_nothing_to_do_is_said(rounds: Any) -> None:
    changed, played = rounds(Plan())
    assert (changed, played.applied) == (False, [])


def test_what_shows_later_is_done_in_the_same_run(rounds: Any) -> None:
    changed, played = rounds(WORK, MORE, Plan())
    assert (changed, played.applied) == (True, [WORK, MORE])


def test_what_heals_by_itself_is_waited_for(rounds: Any) -> None:
    changed, played = rounds(WORK, WAIT, WAIT, Plan())
    assert (changed, played.applied) == (True, [WORK])
    changed, played = rounds(WAIT, MORE, MORE, Plan())  # a short look, a whole one
    assert (changed, played.applied) == (True, [MORE])


def test_what_does_not_heal_is_an_error(rounds: Any) -> None:
    with pytest.raises(SwarmmailError, match="not all is as wanted after bootstrap: host1 is down in the Swarm"):
        rounds(WAIT)


@pytest.mark.parametrize(
    ("states", "waits"),
    [(["down"], 1), (["unknown", "down"], 2), (["unknown"] * 9, bootstrap.ELECTIONS), (["unknown", "ready"], 2)],
)
def test_a_new_leader_has_time_of_its_own_to_hear_of_all_nodes(
    monkeypatch: pytest.MonkeyPatch, states: list[str], waits: int
) -> None:
    seen: list[str] = []

    def wait_until(read: Any, good: Any, seconds: float, pause: float = 0.5) -> Any:
        return read()

    def observe(fleet: object) -> Observed:
        seen.append(states[len(seen)])
        return Observed({}, Swarm("s", "lab", "host1", {"n": Node("n", "", "manager", seen[-1], "active", "")}))

    def decide(inventory: object, observed: Observed) -> tuple[None, Plan]:
        ready = observed.swarm is not None and observed.swarm.nodes["n"].state == "ready"
        return None, Plan() if ready else WAIT

    monkeypatch.setattr(bootstrap.swarm, "wait_until", wait_until)
    monkeypatch.setattr(bootstrap, "observe", observe)
    monkeypatch.setattr(bootstrap, "_refresh", lambda fleet, before: before)
    monkeypatch.setattr(bootstrap, "decide", decide)
    found = bootstrap._wait(Fleet(), (Observed({}), None, WAIT))  # type: ignore[arg-type]
    assert (len(seen), found[2].is_done) == (waits, states[-1] == "ready")


def silent(seconds: int, *more: Step) -> Plan:
    return Plan((Step(Action.MESH, "host3", f"no handshake with host1 for {seconds} s: a new port", "key1"), *more))


def test_a_new_port_that_does_not_help_is_said_and_not_tried_again(rounds: Any) -> None:
    with pytest.raises(SwarmmailError, match=r"host1 for 240 s.* -> another port did not help; is UDP 51820 .*open"):
        rounds(silent(200), silent(240), Plan())
    changed, played = rounds(silent(200), silent(240, *MORE.steps), Plan())
    assert (changed, len(played.applied)) == (True, 2)


def test_what_never_ends_is_an_error(rounds: Any) -> None:
    with pytest.raises(SwarmmailError, match="host1: start Docker"):
        rounds(WORK)


@pytest.mark.parametrize("level", list(findings.Level))
def test_before_a_host_becomes_a_member_the_preflight_may_stop_everything(
    rounds: Any, monkeypatch: pytest.MonkeyPatch, level: findings.Level
) -> None:
    looks: list[str] = []
    found = findings.Finding(level, "host1 -> host2", "UDP 51820", "does not arrive", "why", "ufw allow 51820/udp")
    monkeypatch.setattr(bootstrap.check, "run", lambda fleet, observed: looks.append("look") or [found])
    if level is findings.Level.ERROR:
        with pytest.raises(
            Refused, match=r"host1 -> host2, UDP 51820: does not arrive -> ufw allow.*[\s\S]*--no-check"
        ):
            rounds(MORE, Plan(), preflight=True)
    else:
        assert rounds(MORE, Plan(), preflight=True)[1].applied == [MORE]
        rounds(WORK, Plan(), preflight=True)
    assert looks == ["look"], "once, and only where a host joins"


NAMED = Plan((Step(Action.LABEL, "host1", "label its node"),))


@pytest.mark.parametrize(("plan", "whole"), [(NAMED, 0), (WORK, 1), (Plan(NAMED.steps + WORK.steps), 1)])
def test_after_steps_within_docker_only_docker_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, whole: int
) -> None:
    looks: list[str] = []
    monkeypatch.setattr(bootstrap, "observe", lambda fleet: looks.append("whole"))
    monkeypatch.setattr(bootstrap, "_refresh", lambda fleet, before: looks.append("short"))
    monkeypatch.setattr(bootstrap, "decide", lambda *_: (None, Plan()))
    bootstrap._after(Fleet(), None, plan)  # type: ignore[arg-type]
    assert looks == (["whole"] if whole else ["short"])


def test_nothing_is_done_on_the_strength_of_a_short_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    monkeypatch.setattr(bootstrap, "observe", lambda fleet: looks.append("whole"))
    monkeypatch.setattr(bootstrap, "_refresh", lambda fleet, before: looks.append("short"))
    monkeypatch.setattr(bootstrap, "decide", lambda *_: (None, MORE))
    bootstrap._after(Fleet(), None, NAMED)  # type: ignore[arg-type]
    assert looks == ["short", "whole"]


def test_what_heals_at_once_is_no_warning(rounds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rounds(WORK, WAIT, WAIT, Plan())
    assert "warning" not in capsys.readouterr().err


def test_what_stays_is_said_while_it_is_waited_for(rounds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SwarmmailError):
        rounds(WAIT)
    assert "warning: host1 is down in the Swarm; waiting" in capsys.readouterr().err


# ---- whom to ask ----


def view(monkeypatch: pytest.MonkeyPatch, *silent: str) -> list[str]:
    asked: list[str] = []

    def look(name: str) -> Swarm:
        asked.append(name)
        if name in silent:
            raise HostError("the Swarm has no leader", host=name)
        return Swarm("s", "lab", name)

    monkeypatch.setattr(swarm_work, "view", look)
    return asked


def members(*managers: str) -> dict[str, Any]:
    return {
        name: make_facts(name, swarm="active", node=name, is_manager=name in managers)
        for name in ("host1", "host2", "host3")
    }


def test_the_first_manager_that_answers_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = view(monkeypatch, "host1")
    found = bootstrap.look_at_swarm(Fleet(), members("host1", "host3"))  # type: ignore[arg-type]
    assert found is not None
    assert (found.manager, asked) == ("host3", ["host1", "host3"])


def test_without_a_manager_there_is_no_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    view(monkeypatch)
    assert bootstrap.look_at_swarm(Fleet(), members()) is None  # type: ignore[arg-type]
    sleeping = {name: replace(facts, swarm="pending") for name, facts in members("host1").items()}
    assert bootstrap.look_at_swarm(Fleet(), sleeping) is None  # type: ignore[arg-type]


def test_managers_of_which_none_answers_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    view(monkeypatch, "host1", "host2")
    with pytest.raises(Refused, match=r"no manager answers for the Swarm \(the Swarm has no leader"):
        bootstrap.look_at_swarm(Fleet(), members("host1", "host2"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("known", "electing"), [(1, False), (2, True), (3, True), (4, False), (5, False)])
def test_an_election_is_waited_for_only_when_enough_managers_run(
    monkeypatch: pytest.MonkeyPatch, known: int, electing: bool
) -> None:
    view(monkeypatch, "host1", "host2")
    facts = {name: replace(one, managers=tuple("abcde"[:known])) for name, one in members("host1", "host2").items()}
    with pytest.raises(bootstrap.NoManager) as seen:
        bootstrap.look_at_swarm(Fleet(), facts)  # type: ignore[arg-type]
    assert isinstance(seen.value, bootstrap.Electing) is electing


@pytest.mark.parametrize(("others", "electing"), [((), False), ((2,), True), ((2, 3), True), ((7,), False)])
def test_a_manager_that_has_just_started_elects_with_the_others(others: tuple[int, ...], electing: bool) -> None:
    told = tuple(address(number) for number in (1, 2, 3))
    facts = {"host1": make_facts("host1", swarm="active", is_manager=True, managers=told)}
    facts |= {f"host{number}": make_facts(f"host{number}", swarm="pending") for number in others}
    assert model.will_elect(["host1"], facts) is electing


class Opening:
    def open_docker(self) -> None:
        """Nothing is opened."""


def leaderless(host: object) -> Swarm:
    raise HostError("the Swarm has no leader", host="host1")


def test_managers_that_miss_a_silent_docker_are_no_obstacle_to_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**members("host1"), "host2": make_facts("host2", engine="", units={"docker": ("inactive", "enabled")})}
    monkeypatch.setattr(bootstrap, "gather_all", lambda fleet, strict: facts)
    monkeypatch.setattr(swarm_work, "view", leaderless)
    fleet = Fleet()
    monkeypatch.setattr(Fleet, "__getitem__", lambda self, name: Opening())
    assert bootstrap.observe(fleet).swarm is None  # type: ignore[arg-type]
    with pytest.raises(bootstrap.NoManager, match="host2: Docker does not answer; run: fab bootstrap"):
        bootstrap.observe(fleet, strict=False)  # type: ignore[arg-type]
    facts["host2"] = members("host1")["host2"]
    with pytest.raises(bootstrap.NoManager, match="bring the missing ones back"):
        bootstrap.observe(fleet)  # type: ignore[arg-type]


def test_a_manager_that_stays_one_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    view(monkeypatch)
    found = bootstrap.look_at_swarm(Fleet("wmm"), members("host1", "host2", "host3"))  # type: ignore[arg-type]
    assert found is not None
    assert found.manager == "host2"


@pytest.mark.parametrize(("away", "held"), [((), True), (("host2",), True), (("host2", "host3"), False)])
def test_a_leader_that_is_left_alone_can_hold_no_lock(
    monkeypatch: pytest.MonkeyPatch, away: tuple[str, ...], held: bool
) -> None:
    taken: list[bool] = []

    @contextlib.contextmanager
    def hold(manager: object, task: str, *, swarm: bool) -> Iterator[None]:
        taken.append(swarm)
        yield

    nodes = {
        name: Node(name, "", "manager", "ready", "active", "", labels={HOST_LABEL: name})
        for name in ("host1", "host2", "host3")
    }
    monkeypatch.setattr(bootstrap.lock, "held", hold)
    facts = members("host1", "host2", "host3")
    facts |= {name: make_facts(name, engine="", units={"docker": ("inactive", "enabled")}) for name in away}
    design, _ = bootstrap.decide(make_inventory("mmm"), Observed(facts, Swarm("s", "lab", "host1", nodes)))
    with bootstrap._locked(Fleet("mmm"), design):  # type: ignore[arg-type]
        assert taken == ([False, True] if held else [False])


# ---- details of steps ----


def test_docker_listens_where_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = make_inventory("mm", encryption="none", hosts={"host2": {"advertise": "203.0.113.9"}})
    facts = {name: make_facts(name) for name in inventory.hosts}
    design, _ = bootstrap.decide(inventory, Observed(facts))
    assert bootstrap._listen(design, "host1") == "198.18.0.11"
    assert bootstrap._listen(design, "host2") == "0.0.0.0"  # noqa: S104
    tunnelled, _ = bootstrap.decide(make_inventory("mm", encryption="wireguard"), Observed(facts))
    assert bootstrap._listen(tunnelled, "host2") == "10.90.0.2"


def test_a_new_node_takes_over_what_the_old_one_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels that say where volumes live; then the old node is removed, and not before."""
    inventory = make_inventory("mw", encryption="ipsec")
    world = World(inventory, [Machine(name, host.address, esp=True) for name, host in inventory.hosts.items()])
    simulate(world)
    observed = world.observe()
    assert observed.swarm is not None
    labels = {HOST_LABEL: "host2", "swarmmail.mda": "true", "swarmmail.queue": "false", "other": "true"}
    old = Node("old", "host2", "worker", "down", "active", "198.18.0.12", labels)
    swarm = replace(observed.swarm, nodes={**observed.swarm.nodes, "old": old})
    design, plan = bootstrap.decide(inventory, replace(observed, swarm=swarm))
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(swarm_work, "set_label", lambda *words: calls.append(words))
    monkeypatch.setattr(swarm_work, "forget", lambda *words: calls.append(words))
    bootstrap._forget(Fleet("mw"), design, plan.of(Action.FORGET), {"host2": "new"})  # type: ignore[arg-type]
    assert calls == [("host1", "new", "swarmmail.mda", "true"), ("host1", "old")]


def test_a_write_that_the_swarm_overtook_is_done_again() -> None:
    """`docker stack deploy` beside an update that the Swarm is about to end: "update out of sequence"."""
    tries: list[str] = []

    def write() -> str:
        tries.append("")
        if len(tries) < 3:
            raise HostError("failed to update service mail_mta: update out of sequence", host="host1", step="deploy")
        return "written"

    assert swarm_work.unless_overtaken(write) == "written" and len(tries) == 3

    def wrong() -> str:
        tries.append("")
        raise HostError("network not found", host="host1", step="deploy")

    with pytest.raises(HostError, match="network not found"):
        swarm_work.unless_overtaken(wrong)
    assert len(tries) == 4
