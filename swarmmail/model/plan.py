"""A plan: the difference between wanted and observed, as data that is printed before it is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What a step does. The order here is the order of the work; within one action hosts run in parallel.

    The tunnel comes before Docker, whose Swarm listens on the tunnel's address and fails for good without it;
    nodes that are gone are removed before a manager is demoted, which could else leave no majority.
    """

    INSTALL = "install"
    MESH = "mesh"
    START = "start"
    LEAVE = "leave"
    INIT = "init"
    JOIN = "join"
    PROMOTE = "promote"
    FORGET = "forget"
    DEMOTE = "demote"
    LABEL = "label"
    NETWORK = "network"


@dataclass(frozen=True)
class Step:
    """One change: what, on which host, and a sentence for people. ``argument`` is what the action needs."""

    action: Action
    host: str
    text: str
    argument: str = ""


@dataclass(frozen=True)
class Plan:
    """Steps in order. ``notes`` are things to know; ``waits`` are things that should heal by themselves."""

    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    is_partial: bool = False
    """Not all could be seen before these steps are done: then plan again."""

    @property
    def is_empty(self) -> bool:
        return not self.steps

    @property
    def is_done(self) -> bool:
        """Nothing to do, and nothing to wait for: the wanted state is here."""
        return not self.steps and not self.waits

    def of(self, action: Action) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.action is action)

    def phases(self) -> Iterator[tuple[Action, tuple[Step, ...]]]:
        for action in Action:
            if steps := self.of(action):
                yield action, steps
