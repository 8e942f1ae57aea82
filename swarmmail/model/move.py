"""The move of a service, with its data if it has any: steps, their order, and what a killed run leaves to do. Pure.

Five phases. The journal in the Swarm names the one that was begun last, so it alone decides what comes next:

======== ============================================ ========================================
phase    what is true                                 a run that died in it is
======== ============================================ ========================================
copy     the source serves                            undone: the copy on the target stays, stale
stop     the source may be stopped; the target never  undone: the source serves again
         served
back     the move is being undone                     undone: the source serves again
cutover  the target may have served                   finished: there is no way back but a move
after    the target serves                            finished: only tidying is left
======== ============================================ ========================================

The order of the acts keeps the invariants: the target's marker becomes ``live`` only when the journal says ``cutover``,
the source's marker ``live`` again only while it does not. Neither happens before the other side can't run.

A service without data takes the same way with fewer steps: it serves on the target before it ends on the source.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

from swarmmail.model.errors import Refused, SwarmmailError, Unreachable

JOURNAL = "swarmmail-move"
"""Name of the Swarm config that holds the journal: there is one move at a time."""
HELD = "held"
"""State of a marker: the source during a move. Its fence waits."""
STANDBY = "standby"
"""State of a marker: the target during a move, its copy not complete. Its fence waits."""
STALE = "stale"
"""State of a marker: an old copy. Its fence refuses."""
MAX_PASSES = 6
SMALL = 10
"""Seconds: what changes while a shorter pass runs is little, and the standby's own pass fetches it."""
FEW, LITTLE = 100, 10_000_000
"""Files, and bytes, that are sent in no time."""


class Phase(StrEnum):
    COPY = "copy"
    STOP = "stop"
    BACK = "back"
    CUTOVER = "cutover"
    AFTER = "after"

    @property
    def is_forward_only(self) -> bool:
        return self in (Phase.CUTOVER, Phase.AFTER)


@dataclass(frozen=True)
class Move:
    """What is moved, from where to where. Written to the journal once, never changed."""

    id: str
    service: str
    role: str
    source: str
    target: str
    source_node: str
    target_node: str
    volumes: tuple[str, ...]
    """As Docker names them; none: the service has no data."""
    generation: int
    """That of the copy on the target."""
    started: float
    """Seconds since the epoch."""
    source_is_dead: bool = False
    """The operator says so: an older copy on the target becomes the live one."""

    @property
    def text(self) -> str:
        return f"{self.service} from {self.source} to {self.target}"

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def decode(data: bytes) -> Move:
    """Raises Refused when it is no journal of ours."""
    try:
        raw = json.loads(data)
        return Move(**{**raw, "volumes": tuple(raw["volumes"])})
    except (ValueError, TypeError, KeyError):
        raise Refused(
            "the journal of a move can't be read", step="read the journal", hint="it is of another version of swarmmail"
        ) from None


@dataclass(frozen=True)
class Step:
    """One step as people see it. ``undo`` is empty where there is nothing to undo, None where only forward is left."""

    name: str
    phase: Phase
    text: str
    undo: str | None = ""


def steps(
    service: str, source: str, target: str, live_copy: bool = True, *, data: bool = True, hook: bool = False
) -> tuple[Step, ...]:
    """What a move does, for people, in order. The names are those of ``Acts``.

    Args:
        live_copy: the volumes may be copied while the service runs.
        data: there are volumes.
        hook: the public address follows by a program of the operator's.
    """
    told = Step("address", Phase.CUTOVER, f"the address hook: let the public address follow to {target}", None)
    address = (told,) if hook else ()
    if not data:
        return (
            Step("prepare", Phase.COPY, f"bring the image to {target}"),
            Step(
                "standby", Phase.COPY, f"label {target}: {service} answers there, too", f"take the label off {target}"
            ),
            Step("serve", Phase.CUTOVER, f"see {service} answer on {target}", None),
            *address,
            Step("tidy", Phase.AFTER, f"take the label off {source}: {service} ends there", None),
            Step("after", Phase.AFTER, "a mail from end to end", None),
        )
    kept = f"the copy on {target} stays as a base for the next try, marked stale"
    copy = f"copy the volumes while {service} runs" if live_copy else f"nothing is copied while {service} runs"
    return (
        Step("prepare", Phase.COPY, f"make volumes on {target} that can't be started; a key for one copy", kept),
        Step("precopy", Phase.COPY, f"{copy}; pass after pass until little is left", kept),
        Step("standby", Phase.COPY, f"label {target}: {service} is up there and waits", f"take the label off {target}"),
        Step("hold", Phase.STOP, "hold what arrives", "let it go"),
        Step("stop", Phase.STOP, f"stop {service} on {source}, see its processes gone", f"start it on {source} again"),
        Step("final", Phase.STOP, "copy what has changed since"),
        Step("compare", Phase.STOP, "compare both sides: every name, size, owner, mode, time"),
        Step("cutover", Phase.CUTOVER, f"the copy on {target} becomes the live one", None),
        Step("serve", Phase.CUTOVER, f"see {service} answer on {target}", None),
        *address,
        Step("release", Phase.CUTOVER, "let go what was held", None),
        Step(
            "tidy", Phase.AFTER, f"mark the copy on {source} stale, keep it, take the label off, remove the key", None
        ),
        Step("after", Phase.AFTER, "watch what was held arrive; a mail from end to end", None),
    )


@dataclass(frozen=True)
class Pass:
    """One pass of the copy."""

    seconds: float
    files: int
    """Sent."""
    bytes: int
    """Sent, of the files' content."""


def another_pass(done: tuple[Pass, ...]) -> bool:
    """Whether one more copy of a running service makes the last one shorter. Not when it had little to send: what took
    its time then was to look at all files, and the next would take as long."""
    if not done:
        return True
    if len(done) >= MAX_PASSES or done[-1].seconds <= SMALL:
        return False
    if done[-1].files <= FEW and done[-1].bytes <= LITTLE:
        return False
    return len(done) < 2 or done[-1].seconds < 0.7 * done[-2].seconds


@dataclass
class Standstill:
    """Whether a copy stands still: no sign of it on either side has changed for ``limit`` seconds."""

    limit: float
    _signs: object = None
    _since: float = 0.0

    def reached(self, signs: object, now: float) -> bool:
        """``now``: seconds of any clock that never goes back."""
        if signs != self._signs:
            self._signs, self._since = signs, now
        return now - self._since >= self.limit


@dataclass(frozen=True)
class Measured:
    """A volume, or several, as seen on a host. ``free`` (bytes) and ``free_inodes``: of its file system."""

    bytes: int = 0
    files: int = 0
    free: int = 0
    free_inodes: int = 0


def room(need: Measured, there: Measured, host: str) -> list[str]:
    """What the target lacks. Twice the volume: a file that changed is written anew beside the old one."""
    problems = []
    wanted = 2 * need.bytes - there.bytes
    if there.free < wanted:
        problems.append(f"{host}: {there.free / 1e6:.0f} MB free, {wanted / 1e6:.0f} MB wanted (twice the volume)")
    inodes = math.ceil(1.1 * need.files) - there.files
    if there.free_inodes and there.free_inodes < inodes:
        problems.append(f"{host}: {there.free_inodes} inodes free, {inodes} wanted")
    return problems


def estimate(need: Measured, there: Measured, rate: float, live_copy: bool) -> tuple[float, float]:
    """Seconds of the whole move, and of the gap. ``rate``: bytes/s. Per file and fixed parts as measured in the lab."""
    missing = max(0, need.bytes - there.bytes)
    first = missing / rate + max(0, need.files - there.files) / 8000
    scan = need.files / 60_000
    if live_copy:
        return 6 + first + 2 * scan, 0.8 + scan
    return 6 + first, 0.8 + first + scan


class Acts(Protocol):
    """What a move does to hosts. Each may be done twice, and may die in the middle of any."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What this move consists of: what is not named is left out."""

    def prepare(self) -> None: ...
    def precopy(self) -> None: ...
    def standby(self) -> None: ...
    def hold(self) -> None: ...
    def stop(self) -> None: ...
    def final(self) -> None: ...
    def compare(self) -> None: ...
    def cutover(self) -> None:
        """Write ``live`` into the markers of the target. Never before the journal says so."""

    def serve(self) -> None: ...
    def address(self) -> None:
        """Let the public address follow. What goes wrong there is no reason to stop: the move stands."""

    def release(self) -> None: ...
    def tidy(self) -> None: ...
    def after(self) -> None: ...
    def revive(self) -> None:
        """Write ``live`` into the markers of the source, and see it serve. Never after the journal said cutover."""

    def retreat(self) -> None:
        """Take the standby and the key away; the copy becomes stale."""


class Journal(Protocol):
    """Where the move stands, kept in the Swarm. Every change fails when somebody else changed it in between."""

    @property
    def phase(self) -> Phase: ...
    def advance(self, phase: Phase) -> None: ...
    def remove(self) -> None: ...


Watch = Callable[[str, float], None]
"""Called after each step with its name and its seconds."""


_MENDED = "when that is mended: fab migrate."


@dataclass
class Run:
    """One run over the steps. ``watch`` hears how long each took."""

    move: Move
    acts: Acts
    journal: Journal
    watch: Watch = lambda name, seconds: None

    def _do(self, *names: str) -> None:
        there = {step.name for step in self.acts.steps}
        for name in names:
            if name not in there:
                continue
            began = time.monotonic()
            getattr(self.acts, name)()
            self.watch(name, time.monotonic() - began)

    def forward(self) -> None:
        """From the beginning to the end; what fails before the cutover is undone.

        Raises:
            SwarmmailError: why it failed, and where the service is now.
        """
        try:
            self._do("prepare", "precopy", "standby")
            self.journal.advance(Phase.STOP)
            self._do("hold", "stop", "final", "compare")
            self.journal.advance(Phase.CUTOVER)
        except Overtaken:
            self._let_go()
            raise
        except (Exception, KeyboardInterrupt) as error:  # a mistake of our own must not leave mail on hold either
            self._undo_after(error)
            raise
        self.finish()

    def _undo_after(self, error: BaseException) -> None:
        try:
            self.back()
        except Overtaken:
            self._let_go()
            raise
        except SwarmmailError as worse:
            raise SwarmmailError(
                f"{error or type(error).__name__}; and it could not be undone: {worse}",
                step="migrate",
                hint=self._hints(worse, f"{_MENDED}abort; {self.move.service} is on {self.move.source}"),
            ) from None

    def _hints(self, error: SwarmmailError, *others: str | None) -> str:
        """What to do next, also when the host that does not answer never comes back."""
        hints = list(others)
        if isinstance(error, Unreachable):
            other = self.move.source if error.host == self.move.target else self.move.target
            again = f"fab migrate --service {self.move.service} --to {other} --source-is-dead"
            hints.append(f"if {error.host} is lost for good: {again}")
        return "; ".join(filter(None, hints))

    def _left(self, error: SwarmmailError, state: str, command: str) -> SwarmmailError:
        return SwarmmailError(
            f"{error.what}; the move of {self.move.text} is {state}",
            host=error.host,
            step=error.step,
            hint=self._hints(error, error.hint, f"{_MENDED}{command}"),
        )

    def _let_go(self) -> None:
        """What an overtaken run held nobody else may know of; to let it go is harmless where another holds, too."""
        with contextlib.suppress(SwarmmailError):
            self.acts.release()

    def back(self) -> None:
        """Undo. The source first: it is what people wait for.

        The journal before it: a run that only seems dead can't go on to the cutover then, and if the journal took that
        word although its answer was lost, this one fails.
        """
        self.journal.advance(Phase.BACK)
        self.acts.revive()
        self.acts.release()
        self.acts.retreat()
        self.journal.remove()

    def finish(self) -> None:
        """From the cutover to the end.

        Raises:
            SwarmmailError: why it failed, that there is no way back, and how to go on.
        """
        try:
            self._finish()
        except (NotServing, Overtaken):
            raise
        except SwarmmailError as error:
            raise self._left(error, "past its cutover, and not over", "resume") from error

    def _finish(self) -> None:
        """A target that has the data and does not serve is tidied up too, so that it can be moved."""
        failure: SwarmmailError | None = None
        if self.journal.phase is not Phase.AFTER:
            self._do("cutover")
            try:
                self._do("serve", "address")
            except NotServing as error:
                failure = error
            self._do("release")
            self.journal.advance(Phase.AFTER)
        try:
            self._do("tidy")
            if failure is None:
                self._do("after")
        except NotServing as error:
            failure = error
        except SwarmmailError as error:
            if failure is not None:
                error.what = f"{failure.what}; and {error.what}"
            raise
        self.journal.remove()
        if failure is not None:
            raise failure

    def recover(self) -> bool:
        """What a run that died left to do; True when the service is now on the target."""
        if self.journal.phase.is_forward_only:
            self.finish()
            return True
        try:
            self.back()
        except Overtaken:
            raise
        except SwarmmailError as error:
            raise self._left(error, "not undone yet", "abort") from error
        return False


class Overtaken(SwarmmailError):
    """Somebody else went on with this move, or ended it: this run stops where it is."""


class NotServing(SwarmmailError):
    """The service has its data, and does not answer."""


# ---- markers ----


def marker(cluster: str, service: str, generation: int, node: str, state: str) -> str:
    """The text of a marker (see ``mail/fence.sh``)."""
    return f"cluster={cluster}\nservice={service}\ngeneration={generation}\nnode={node}\nstate={state}\n"
