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
    users: set[str] = field(default_factory=lambda: {"ann@example.org"})
    told: list[str] = field(default_factory=list)

    def call(self, command: str, *words: str, stdin: str = "", step: str) -> str:
        if self.gone:
            raise HostError("No such container", host="host1", step=step)
        self.given.append(stdin)
        if command.endswith("recipients"):
            self.told = stdin.split()
            return ""
        verb = words[3:] if command == "sh" else words  # sh -c SCRIPT users-command VERB ..., and then the list
        if verb[0] == "add":
            if verb[1] in self.users:
                raise HostError(f"{verb[1]} exists already", host="host1", step=step)
            self.users.add(verb[1])
        elif verb[0] == "remove":
            self.users.discard(verb[1])
        return "".join(f"{user}\n" for user in sorted(self.users))


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


PROBE = "probe@example.org"


@pytest.mark.parametrize("left", [False, True], ids=["", "left by a killed run"])
@pytest.mark.parametrize("tell", [True, False])
def test_a_temporary_account_is_gone_afterwards_and_the_mta_knows(looks: list[Any], left: bool, tell: bool) -> None:
    box = Box()
    if left:
        box.users.add(PROBE)
    with Accounts(None, View(box)).temporary(PROBE, tell=tell) as password:  # type: ignore[arg-type]
        assert PROBE in box.users and f"{password}\n" in box.given
        assert (PROBE in box.told) is tell or left  # of one that was left it may know already
    assert box.told == ["ann@example.org"] and box.users == {"ann@example.org"}


def test_few_processes_are_started_for_it(looks: list[Any]) -> None:
    """Each takes longer to start in a container than to run: a second on a slow host."""
    box = Box()
    with Accounts(None, View(box)).temporary(PROBE):  # type: ignore[arg-type]
        assert len(box.given) == 2  # add and list, tell
    assert len(box.given) == 4


def test_who_is_there_already_is_told_to_the_mta_all_the_same(looks: list[Any]) -> None:
    box = Box()
    with pytest.raises(HostError, match="exists already"):
        Accounts(None, View(box)).add("ann@example.org", "x")  # type: ignore[arg-type]
    assert box.told == ["ann@example.org"]
