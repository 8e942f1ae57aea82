"""The ledger: every mail that was sent, and what became of it. Pure.

Counts as Jepsen's ``total-queue`` checker does: an acknowledged mail must come out; one whose fate is unknown may.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Entry:
    """One mail. Times in seconds of one clock."""

    sent: float
    acknowledged: float | None = None
    """When the server said 250."""
    refused: bool = False
    """The server said no, or there was no connection at all: the mail must not come out."""


@dataclass(frozen=True)
class Verdict:
    """The counts. ``lost`` and ``unexpected`` are the faults; both name the mails."""

    attempted: int
    acknowledged: int
    delivered: int
    lost: tuple[str, ...]
    """Acknowledged, and now neither in a mailbox nor in a queue."""
    queued: int
    """Acknowledged, and still in a queue."""
    unexpected: tuple[str, ...]
    """In a mailbox, though never sent, or refused."""
    duplicated: int
    """Copies beyond the first."""
    recovered: int
    """In a mailbox, though nobody knew whether it had been accepted."""
    longest: float
    """The longest delay from 250 to the mailbox, seconds; 0 when no arrival time is known."""

    @property
    def is_clean(self) -> bool:
        return not self.lost and not self.unexpected

    def __str__(self) -> str:
        delay = f", longest delay {self.longest:.2f} s" if self.longest else ""
        return (
            f"{self.attempted} attempted, {self.acknowledged} acknowledged, {self.delivered} delivered, "
            f"{len(self.lost)} lost, {len(self.unexpected)} unexpected, {self.duplicated} duplicated, "
            f"{self.recovered} recovered, {self.queued} in the queue{delay}"
        )


@dataclass
class Ledger:
    """Filled by senders from several threads."""

    entries: dict[str, Entry] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def attempt(self, token: str, now: float) -> None:
        with self._lock:
            if token in self.entries:
                raise ValueError(f"{token} was sent before: each mail has its own token")
            self.entries[token] = Entry(now)

    def acknowledge(self, token: str, now: float) -> None:
        with self._lock:
            self.entries[token].acknowledged = now

    def refuse(self, token: str) -> None:
        with self._lock:
            self.entries[token].refused = True

    def judge(
        self, found: Iterable[str], queued: Iterable[str] = (), arrived: Mapping[str, float] | None = None
    ) -> Verdict:
        """``found``: the token of each mail in any mailbox, once a copy; ``queued``: of each mail in a queue;
        ``arrived``: when a mail came into its mailbox, by the senders' clock."""
        with self._lock:
            entries = dict(self.entries)
        copies: dict[str, int] = {}
        for token in found:
            copies[token] = copies.get(token, 0) + 1
        waiting = set(queued) - copies.keys()
        acknowledged = {token for token, entry in entries.items() if entry.acknowledged is not None}
        unknown = {token for token, entry in entries.items() if entry.acknowledged is None and not entry.refused}
        delays = [
            when - acked
            for token, when in (arrived or {}).items()
            if token in entries and (acked := entries[token].acknowledged) is not None
        ]
        return Verdict(
            attempted=len(entries),
            acknowledged=len(acknowledged),
            delivered=len(copies.keys() & acknowledged),
            lost=tuple(sorted(acknowledged - copies.keys() - waiting)),
            queued=len(waiting & acknowledged),
            unexpected=tuple(sorted(copies.keys() - acknowledged - unknown)),
            duplicated=sum(count - 1 for count in copies.values()),
            recovered=len(copies.keys() & unknown),
            longest=max([0.0, *delays]),
        )


GONE = ""
"""State of a message that is in no folder."""


@dataclass
class Actions:
    """What clients did to messages of their own (append, flag, move, expunge): an acknowledged action is kept.

    A message is in one state, a text (say, folder and flags), or GONE. Several threads may fill it, each with its own
    tokens.
    """

    possible: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By token, the states that it may be in: one, unless an action got no answer."""

    def attempt(self, token: str, state: str) -> None:
        self.possible[token] = (*self.possible.get(token, (GONE,)), state)

    def acknowledge(self, token: str, state: str) -> None:
        self.possible[token] = (state,)

    def judge(self, found: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """``found``: by token, the state of each copy. A line for each message that is not as it was left.

        A move that got no answer may have left the message in both places (RFC 6851).
        """
        wrong = []
        for token, possible in sorted(self.possible.items()):
            states = found.get(token, ())
            settled = len(possible) == 1
            good = set(states or (GONE,)) <= set(possible) and not (settled and len(states) > 1)
            if not good:
                wrong.append(f"{token} is {' and '.join(states) or 'gone'}, was left {' or '.join(possible) or 'gone'}")
        return (*wrong, *(f"{token} was made by nobody" for token in sorted(found.keys() - self.possible.keys())))
