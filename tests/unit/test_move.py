"""The move's order of acts, in a small world in which everything can die at any moment.

The world knows two hosts, their markers, the Swarm's labels and tasks, a writer, mail that is acknowledged, and a
journal that compares versions. The very ``Run`` of the program acts on it; rules kill it at any point of any act, lose
answers, restart tasks, let a run that was thought dead go on. What must hold is checked after every change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarmmail.model import move as model
from swarmmail.model.errors import HostError, Refused, SwarmmailError, Unreachable
from swarmmail.model.move import HELD, STALE, STANDBY, Measured, Move, NotServing, Overtaken, Pass, Phase, Run
from swarmmail.model.placement import LIVE

SOURCE, TARGET = "host3", "host2"


class Killed(BaseException):
    """SIGKILL of the operator."""


def a_move(number: int = 1, source: str = SOURCE, target: str = TARGET, generation: int = 2) -> Move:
    return Move(
        f"id{number}", "mda", "mda", source, target, f"n-{source}", f"n-{target}", ("mail_mail",), generation, 0.0
    )


@dataclass
class World:
    """What is true, whoever believes what."""

    markers: dict[str, tuple[int, str]] = field(default_factory=lambda: {SOURCE: (1, LIVE)})
    labels: set[str] = field(default_factory=lambda: {SOURCE})
    running: set[str] = field(default_factory=lambda: {SOURCE})
    """Hosts where the service itself runs: where it writes."""
    data: dict[str, set[int]] = field(default_factory=lambda: {SOURCE: set()})
    queue: set[int] = field(default_factory=set)
    held: bool = False
    door: str | None = None
    """The move whose key is let in, if any."""
    journal: tuple[Move, Phase] | None = None
    version: int = 0
    accepted: set[int] = field(default_factory=set)
    well: bool = True
    """Whether the service answers on a host that is new to it."""

    # what the Swarm and the fences do by themselves
    def schedule(self) -> None:
        for host in list(self.running):
            if host not in self.labels:
                self.running.discard(host)
        for host in self.labels:
            if self.markers.get(host, (0, ""))[1] == LIVE:
                self.running.add(host)

    def deliver(self) -> None:
        """The MTA tries its queue: only a service that runs takes mail, and says so."""
        if self.held or not self.running:
            return
        [host] = self.running
        self.data.setdefault(host, set()).update(self.queue)
        self.queue.clear()

    def accept(self) -> None:
        """The MTA takes a mail; a client appends one by IMAP."""
        self.accepted.add(len(self.accepted))
        self.queue.add(len(self.accepted) - 1)
        for host in self.running:
            self.accepted.add(len(self.accepted))
            self.data[host].add(len(self.accepted) - 1)

    def check(self) -> None:
        live = [host for host, (_, state) in self.markers.items() if state == LIVE]
        assert len(live) <= 1, f"two live copies: {self.markers}"
        assert len(self.running) <= 1, f"two writers: {self.running}"
        where = self.running or set(live)
        if where:
            [host] = where
            lost = self.accepted - self.data.get(host, set()) - self.queue
            assert not lost, f"mail {lost} is neither on {host} nor in the queue"


class FakeJournal:
    """One run's view of the journal: it knows the version that it saw last."""

    def __init__(self, world: World, before: Callable[[str], None]) -> None:
        assert world.journal is not None
        self.world, self.before = world, before
        self.seen, self.known = world.journal, world.version

    @property
    def phase(self) -> Phase:
        return self.seen[1]

    def advance(self, phase: Phase) -> None:
        self.before(f"journal {phase}")
        if self.world.journal is None or self.known != self.world.version:
            raise Overtaken("somebody else")
        self.world.version += 1
        self.world.journal = (self.seen[0], phase)
        self.before(f"journal {phase}, written")  # its answer may be lost
        if self.world.journal is None or self.world.journal[1] is not phase:
            raise Overtaken("somebody else")
        self.seen, self.known = self.world.journal, self.world.version

    def remove(self) -> None:
        self.before("journal removed")
        if self.world.journal is not None and self.world.journal[0].id == self.seen[0].id:
            self.world.journal = None
            self.world.version += 1


class FakeActs:
    """The acts, cut into the pieces between which a run can die."""

    steps = model.steps("mda", SOURCE, TARGET, hook=True)

    def __init__(self, world: World, move: Move, before: Callable[[str], None]) -> None:
        self.world, self.move, self.before = world, move, before

    def _mark(self, host: str, generation: int, state: str, expected: set[str], needs_door: bool = False) -> None:
        self.before(f"mark {host} {state}")
        if needs_door and self.world.door != self.move.id:
            raise Refused("this move was ended by somebody else")
        now = self.world.markers.get(host)
        if now == (generation, state):
            return
        older = now is not None and "older" in expected and now[1] == LIVE and now[0] < generation - 1
        if now is not None and now[1] not in expected and not older:
            raise Refused(f"{host} is marked {now[1]}")
        self.world.markers[host] = (generation, state)
        self.world.check()

    def _copy(self) -> None:
        self.before("copy")
        if self.world.door != self.move.id:
            raise Refused("this move was ended by somebody else")
        source, target = self.move.source, self.move.target
        self.world.data[target] = set(self.world.data[source])

    def _close(self) -> None:
        self.before("close")
        self.world.door = None

    def prepare(self) -> None:
        self._close()
        self._mark(self.move.target, self.move.generation, STANDBY, {"older", STALE, STANDBY})
        self.before("open")
        self.world.door = self.move.id

    def precopy(self) -> None:
        self._copy()

    def standby(self) -> None:
        self.before("label")
        self.world.labels.add(self.move.target)
        self.world.schedule()

    def hold(self) -> None:
        self.before("hold")
        self.world.held = True

    def stop(self) -> None:
        self._mark(self.move.source, self.move.generation - 1, HELD, {LIVE, HELD}, needs_door=True)
        self.before("stop")
        if self.world.door != self.move.id:
            raise Refused("this move was ended by somebody else")
        self.world.running.discard(self.move.source)
        self.before("stopped")

    def final(self) -> None:
        self._copy()

    def compare(self) -> None:
        self.before("compare")
        if self.world.door != self.move.id:
            raise Refused("this move was ended by somebody else")
        if self.world.data[self.move.target] != self.world.data[self.move.source]:
            raise HostError("differs")

    def cutover(self) -> None:
        self._mark(self.move.target, self.move.generation, LIVE, {STANDBY, LIVE})
        self.before("live")
        self.world.schedule()
        self.world.check()

    def serve(self) -> None:
        self.before("serve")
        self.world.schedule()
        if self.move.target not in self.world.running:
            raise NotServing("not up")
        if not self.world.well:
            raise NotServing("ill")

    def address(self) -> None:
        self.before("address")
        assert self.move.target in self.world.running, "the world is sent where nobody answers"

    def release(self) -> None:
        self.before("release")
        self.world.held = False
        self.before("flush")
        self.world.deliver()

    def tidy(self) -> None:
        self._close()
        self._mark(self.move.source, self.move.generation - 1, STALE, {HELD, STALE})
        self.before("unlabel")
        self.world.labels.discard(self.move.source)
        self.world.schedule()

    def after(self) -> None:
        self.before("after")

    def revive(self) -> None:
        self._mark(self.move.source, self.move.generation - 1, LIVE, {HELD, LIVE})
        self.before("revive")
        self.world.schedule()

    def retreat(self) -> None:
        self._close()
        if self.world.markers.get(self.move.target, (0, ""))[1] == STANDBY:
            self._mark(self.move.target, self.move.generation, STALE, {STANDBY})
        self.before("unlabel")
        self.world.labels.discard(self.move.target)
        self.world.schedule()


class Moves(RuleBasedStateMachine):
    """Moves, deaths, mail, and the next command."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.number = 0
        self.overtaken = False

    @property
    def place(self) -> str:
        [host] = [host for host, (_, state) in self.world.markers.items() if state == LIVE]
        return host

    def _dying(self, at: int, how: type[BaseException]) -> Callable[[str], None]:
        left = at

        def before(what: str) -> None:
            nonlocal left
            self.world.check()
            self.world.deliver()  # life goes on between two pieces
            self.world.accept()
            if left == 0:
                left -= 1
                raise how("killed") if how is Killed else HostError("connection lost")
            left -= 1

        return before

    def _run(self, at: int, how: type[BaseException], act: Callable[[Run], object]) -> None:
        before = self._dying(at, how)
        assert self.world.journal is not None
        move = self.world.journal[0]
        run = Run(move, FakeActs(self.world, move, before), FakeJournal(self.world, before))
        with contextlib.suppress(Killed, SwarmmailError):
            act(run)

    def _begin(self) -> Move:
        source = self.place
        target = TARGET if source == SOURCE else SOURCE
        self.number += 1
        generation = self.world.markers[source][0] + 1
        self.world.journal = (a_move(self.number, source, target, generation), Phase.COPY)
        self.world.version += 1
        return self.world.journal[0]

    @precondition(lambda self: self.world.journal is None)
    @rule(at=st.integers(0, 30), how=st.sampled_from([Killed, HostError]), well=st.booleans())
    def migrate(self, at: int, how: type[BaseException], well: bool) -> None:
        self.world.well = well
        self._begin()
        self._run(at, how, Run.forward)
        self.world.well = True

    @precondition(lambda self: self.world.journal is not None)
    @rule(at=st.integers(0, 30), how=st.sampled_from([Killed, HostError]))
    def recover(self, at: int, how: type[BaseException]) -> None:
        self._run(at, how, Run.recover)

    @rule(at=st.integers(0, 30), again=st.integers(0, 30), act=st.sampled_from([Run.forward, Run.recover]))
    def a_run_thought_dead_goes_on_beside_another(self, at: int, again: int, act: Callable[[Run], object]) -> None:
        """The first stands still at some point; another recovers; then the first goes on."""
        if self.world.journal is None:
            self._begin()
        assert self.world.journal is not None
        if act is Run.forward and self.world.journal[1] is not Phase.COPY:
            return  # only the run that began a move goes forward
        self.overtaken = True
        move = self.world.journal[0]
        other = {"done": False}

        def first(what: str) -> None:
            self.world.check()
            first.left -= 1  # type: ignore[attr-defined]
            if first.left == 0 and not other["done"] and self.world.journal is not None:  # type: ignore[attr-defined]
                other["done"] = True
                self._run(again, Killed, Run.recover)

        first.left = at + 1  # type: ignore[attr-defined]
        run = Run(move, FakeActs(self.world, move, first), FakeJournal(self.world, first))
        with contextlib.suppress(SwarmmailError):
            act(run)

    @rule()
    def a_task_is_started_anew(self) -> None:
        self.world.running.clear()
        self.world.schedule()

    @rule()
    def mail(self) -> None:
        self.world.accept()
        self.world.deliver()

    @invariant()
    def sound(self) -> None:
        self.world.check()

    @invariant()
    def the_next_command_ends_it_well(self) -> None:
        """From wherever it stands: one run that nobody kills, and the service serves with all its mail."""
        import copy

        world = copy.deepcopy(self.world)
        if world.journal is not None:
            move = world.journal[0]
            with contextlib.suppress(NotServing):
                Run(move, FakeActs(world, move, lambda what: None), FakeJournal(world, lambda what: None)).recover()
        world.schedule()
        world.deliver()
        world.check()
        [host] = world.running
        assert world.journal is None and not world.held and world.markers[host][1] == LIVE
        # a run that was overtaken may leave a label and a key, which can do no harm: see migrate.abort
        assert self.overtaken or (world.labels == {host} and world.door is None)
        assert world.data[host] == world.accepted


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)


def pieces() -> int:
    count = 0

    def before(what: str) -> None:
        nonlocal count
        count += 1

    world = World(journal=(a_move(), Phase.COPY))
    Run(a_move(), FakeActs(world, a_move(), before), FakeJournal(world, before)).forward()
    return count


@pytest.mark.parametrize("at", range(pieces() + 1))
@pytest.mark.parametrize("how", [Killed, HostError])
def test_killed_or_cut_off_before_each_piece(at: int, how: type[BaseException]) -> None:
    """Every point once, for certain; the state machine mixes them."""
    machine = Moves()
    machine.world.accept()
    machine._begin()
    machine._run(at, how, Run.forward)
    machine.sound()
    machine.the_next_command_ends_it_well()


@pytest.mark.parametrize("at", range(pieces() + 1))
def test_a_run_that_stands_still_while_another_recovers(at: int) -> None:
    for again in range(pieces() + 1):
        machine = Moves()
        machine.a_run_thought_dead_goes_on_beside_another(at=at, again=again, act=Run.forward)
        machine.sound()
        machine.the_next_command_ends_it_well()


def test_undisturbed_it_ends_on_the_target_while_people_go_on_writing() -> None:
    world = World(journal=(a_move(), Phase.COPY))

    def life(what: str) -> None:
        world.accept()
        world.deliver()
        world.check()

    Run(a_move(), FakeActs(world, a_move(), life), FakeJournal(world, life)).forward()
    assert world.running == world.labels == {TARGET} and not world.held and world.journal is None
    assert world.data[TARGET] | world.queue == world.accepted


def test_a_failure_before_the_cutover_is_undone_and_said() -> None:
    world = World(journal=(a_move(), Phase.COPY))

    def before(what: str) -> None:
        if what == "compare":
            raise HostError("differs", host=TARGET, step="compare")

    with pytest.raises(HostError, match="differs"):
        Run(a_move(), FakeActs(world, a_move(), before), FakeJournal(world, before)).forward()
    assert world.running == {SOURCE} and world.journal is None and world.markers[TARGET][1] == STALE


def test_a_target_that_does_not_serve_is_tidied_up_and_said() -> None:
    world = World(journal=(a_move(), Phase.COPY), well=False)
    with pytest.raises(NotServing):
        Run(a_move(), FakeActs(world, a_move(), lambda w: None), FakeJournal(world, lambda w: None)).forward()
    assert world.running == {TARGET} and world.journal is None and world.markers[SOURCE] == (1, STALE)


WITHOUT_DATA = replace(a_move(), service="edge", role="edge", volumes=())


class Told:
    """Acts of a service without data: they only remember that they were done. One of them may fail, or be the last."""

    steps = model.steps("edge", SOURCE, TARGET, data=False, hook=True)

    def __init__(self, at: str = "", how: BaseException | None = None) -> None:
        self.done: list[str] = []
        self.at, self.how = at, how

    def __getattr__(self, name: str) -> Callable[[], None]:
        def act() -> None:
            self.done.append(name)
            if name == self.at and self.how is not None:
                raise self.how

        return act


def without_data(acts: Told, world: World, act: Callable[[Run], object] = Run.forward) -> None:
    act(Run(WITHOUT_DATA, acts, FakeJournal(world, lambda what: None)))  # type: ignore[arg-type]


def test_a_service_without_data_answers_on_the_target_before_it_ends_on_the_source() -> None:
    world, acts = World(journal=(WITHOUT_DATA, Phase.COPY)), Told()
    without_data(acts, world)
    assert acts.done == ["prepare", "standby", "serve", "address", "tidy", "after"] and world.journal is None
    assert acts.done == [step.name for step in Told.steps]


def test_a_service_without_data_that_does_not_answer_there_stays() -> None:
    world, acts = World(journal=(WITHOUT_DATA, Phase.COPY)), Told("standby", HostError("not up"))
    with pytest.raises(HostError, match="not up"):
        without_data(acts, world)
    assert acts.done == ["prepare", "standby", "revive", "release", "retreat"] and world.journal is None


@pytest.mark.parametrize(
    ("at", "then"),
    [
        ("prepare", ["revive", "release", "retreat"]),
        ("standby", ["revive", "release", "retreat"]),
        ("serve", ["serve", "address", "tidy", "after"]),
        ("address", ["serve", "address", "tidy", "after"]),
        ("tidy", ["tidy", "after"]),
        ("after", ["tidy", "after"]),
    ],
)
def test_a_killed_move_of_a_service_without_data_is_undone_or_finished(at: str, then: list[str]) -> None:
    world = World(journal=(WITHOUT_DATA, Phase.COPY))
    with pytest.raises(Killed):
        without_data(Told(at, Killed()), world)
    acts = Told()
    without_data(acts, world, Run.recover)
    assert acts.done == then and world.journal is None


@pytest.mark.parametrize("at", ["serve", "address", "tidy", "after"])
def test_what_fails_after_the_cutover_says_where_the_service_is_and_how_to_go_on(at: str) -> None:
    world = World(journal=(WITHOUT_DATA, Phase.COPY))
    failing = Told(at, HostError("no route", host="host9", step="look", hint="see: fab status"))
    with pytest.raises(SwarmmailError) as seen:
        without_data(failing, world)
    assert str(seen.value) == (
        f"host9, look: no route; the move of {WITHOUT_DATA.text} is past its cutover, and not over -> "
        "see: fab status; when that is mended: fab migrate.resume"
    )
    assert world.journal is not None


@pytest.mark.parametrize(
    ("phase", "at", "lost", "left"), [(Phase.AFTER, "tidy", TARGET, SOURCE), (Phase.STOP, "revive", SOURCE, TARGET)]
)
def test_a_host_that_does_not_answer_may_be_lost_for_good(phase: Phase, at: str, lost: str, left: str) -> None:
    world = World(journal=(WITHOUT_DATA, phase))
    with pytest.raises(SwarmmailError, match=rf"if {lost} is lost for good: fab .* --to {left} --source-is-dead$"):
        without_data(Told(at, Unreachable("no route", host=lost)), world, Run.recover)
    with pytest.raises(SwarmmailError, match=r"when that is mended: fab migrate\.\w+$"):
        without_data(Told(at, HostError("no route", host=lost)), world, Run.recover)


@pytest.mark.parametrize("act", [Run.forward, Run.recover])
@pytest.mark.parametrize("at", ["serve", "after"])
def test_what_does_not_serve_is_tidied_up_so_that_it_can_be_moved(at: str, act: Callable[[Run], object]) -> None:
    world = World(journal=(WITHOUT_DATA, Phase.CUTOVER if act is Run.recover else Phase.COPY))
    acts = Told(at, NotServing("ill"))
    with pytest.raises(NotServing, match="ill"):
        without_data(acts, world, act)
    assert acts.done[-2:] == {"serve": ["serve", "tidy"], "after": ["tidy", "after"]}[at]
    assert world.journal is None


def test_what_does_not_serve_is_said_also_when_it_can_not_be_tidied_up() -> None:
    class Ill(Told):
        def serve(self) -> None:
            raise NotServing("ill")

    world = World(journal=(WITHOUT_DATA, Phase.COPY))
    with pytest.raises(SwarmmailError, match=r"ill; and cut off; the move .* not over -> .*migrate\.resume"):
        without_data(Ill("tidy", HostError("cut off")), world)
    assert world.journal is not None and world.journal[1] is Phase.AFTER


def test_the_journal_keeps_the_move() -> None:
    assert model.decode(WITHOUT_DATA.encode()) == WITHOUT_DATA
    assert model.decode(a_move().encode()) == a_move()
    for wrong in (b"", b"{}", b"[]", b"\xff", b'{"volumes": 3}'):
        with pytest.raises(Refused, match="can't be read"):
            model.decode(wrong)


@pytest.mark.parametrize(
    ("seconds", "more"),
    [((), True), ((100.0,), True), ((9.0,), False), ((100.0, 20.0), True), ((100.0, 90.0), False)],
)
def test_passes_repeat_until_little_is_left_or_it_helps_no_more(seconds: tuple[float, ...], more: bool) -> None:
    assert model.another_pass(tuple(Pass(s, 1000, 1) for s in seconds)) is more


def test_passes_end_also_when_each_still_helps() -> None:
    shrinking = [Pass(1000 * 0.6**number, 1000, 1) for number in range(model.MAX_PASSES)]
    assert model.another_pass(tuple(shrinking[:-1])) and not model.another_pass(tuple(shrinking))


@pytest.mark.parametrize(
    ("files", "size", "more"), [(0, 0, False), (100, 10_000_000, False), (101, 0, True), (1, 10_000_001, True)]
)
def test_a_pass_that_had_little_to_send_is_the_last(files: int, size: int, more: bool) -> None:
    assert model.another_pass((Pass(100, 50_000, 10**9), Pass(20, files, size))) is more
    assert model.another_pass((Pass(20, files, size),)) is more


def test_room_counts_what_is_there_already() -> None:
    need = Measured(bytes=100, files=1000)
    assert model.room(need, Measured(free=200, free_inodes=2000), "h") == []
    assert len(model.room(need, Measured(free=199, free_inodes=1099), "h")) == 2
    assert model.room(need, Measured(bytes=50, files=500, free=150, free_inodes=600), "h") == []
    assert model.room(need, Measured(free=200, free_inodes=0), "h") == [], "a file system without inodes"


@pytest.mark.parametrize("data", [True, False])
def test_every_step_says_what_it_does_and_its_phase_never_goes_back(data: bool) -> None:
    found = model.steps("mda", SOURCE, TARGET, data=data, hook=True)
    order = [Phase.COPY, Phase.STOP, Phase.CUTOVER, Phase.AFTER]
    assert [order.index(step.phase) for step in found] == sorted(order.index(step.phase) for step in found)
    assert all((step.undo is None) == step.phase.is_forward_only for step in found)
    assert {step.name for step in found} <= set(dir(model.Acts))


def test_a_copy_stands_still_when_nothing_has_changed_for_so_long() -> None:
    still = model.Standstill(30)
    seen = [("a", 100), ("a", 129), ("b", 130), ("b", 159.9), ("b", 160), ("b", 170), ("c", 171)]
    assert [still.reached(signs, now) for signs, now in seen] == [False] * 4 + [True, True, False]
