"""``mail.accounts``: the containers are those that were seen, until one of them does not answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from swarmmail.mail import services
from swarmmail.mail.accounts import Accounts
from swarmmail.model.errors import HostError


@dataclass
class Box:
    """A container with a list of users, which takes a list of recipients."""

    gone: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)

    def call(self, command: str, *words: str, stdin: str = "", step: str) -> str:
        if self.gone:
            raise HostError("No such container", host="host1", step=step)
        self.given.append(stdin)
        return "ann@example.org\n"


@dataclass
class View:
    box: Box
    observed: str = "the hosts, as they were"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was known of the hosts at each look."""
    asked: list[Any] = []

    def observe(fleet: Any, observed: Any = None) -> View:
        asked.append(observed)
        return View(Box(gone=len(asked) == 1))

    monkeypatch.setattr(services, "running", lambda fleet, seen, role: seen.box)
    monkeypatch.setattr(services, "observe", observe)
    return asked


def test_what_was_seen_is_not_looked_at_again(looks: list[Any]) -> None:
    box = Box()
    Accounts(None, View(box)).sync(patience=5)  # type: ignore[arg-type]
    assert box.given == ["", "ann@example.org\n"]
    assert looks == []


def test_containers_that_were_replaced_are_found_without_asking_the_hosts_again(looks: list[Any]) -> None:
    accounts = Accounts(None, View(Box(gone=True)))  # type: ignore[arg-type]
    accounts.sync(patience=5)
    assert accounts.mta.given == ["", "ann@example.org\n"]  # type: ignore[attr-defined]
    assert looks == ["the hosts, as they were"] * 2
    assert accounts.seen.box is accounts.mda  # type: ignore[attr-defined]


def test_without_patience_a_failure_is_one(looks: list[Any]) -> None:
    with pytest.raises(HostError, match="No such container"):
        Accounts(None, View(Box(gone=True))).sync()  # type: ignore[arg-type]
    assert looks == []
