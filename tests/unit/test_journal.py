"""``move.journal``: of two runs one goes on, and a run whose answer was lost in an election knows its own word."""

from __future__ import annotations

import base64
import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import docker.errors
import pytest

from swarmmail.hosts import dockerapi
from swarmmail.model.errors import HostError
from swarmmail.model.move import JOURNAL, Move, Overtaken, Phase
from swarmmail.move import journal

MOVE = Move("m", "mda", "mda", "host1", "host2", "n1", "n2", ("mail_mail",), 2, 0.0)


class Manager:
    """One config, kept as Docker keeps it: a change must name the version that it is based on."""

    name = "host1"

    def __init__(self) -> None:
        self.kept: dict[str, Any] | None = None
        self.lost: list[bool] = []
        """The leader falls in the middle of the next writes: whether each counted."""

    @property
    def docker(self) -> Manager:
        return self

    @contextlib.contextmanager
    def doing(self, step: str) -> Iterator[None]:
        try:
            yield
        except docker.errors.APIError as error:
            raise HostError(str(error), host=self.name, step=step) from None

    def create_config(self, name: str, data: bytes, labels: dict[str, str]) -> None:
        spec = {"Name": name, "Data": base64.b64encode(data).decode(), "Labels": labels}
        self.kept = {"ID": "c", "Version": {"Index": 1}, "Spec": spec}

    def configs(self, filters: dict[str, str]) -> list[dict[str, Any]]:
        return [copy.deepcopy(self.kept)] if self.kept and filters == {"name": JOURNAL} else []

    def inspect_config(self, wanted: str) -> dict[str, Any]:
        if self.kept is None:
            raise docker.errors.NotFound("no such config")
        return copy.deepcopy(self.kept)

    def update(self, api: object, kind: str, raw: dict[str, Any], spec: dict[str, Any]) -> None:
        falls = self.lost.pop(0) if self.lost else None
        if falls is not False:
            if self.kept is None:
                raise docker.errors.NotFound("no such config")
            if raw["Version"] != self.kept["Version"]:
                raise docker.errors.APIError("rpc error: code = Unknown desc = update out of sequence")
            self.kept = {**self.kept, "Spec": copy.deepcopy(spec), "Version": {"Index": raw["Version"]["Index"] + 1}}
        if falls is not None:
            raise docker.errors.APIError(f"rpc error: code = Unknown desc = {dockerapi.NO_LEADER[1]}")


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    made = Manager()
    monkeypatch.setattr(journal, "update", made.update)
    return made


def test_it_begins_in_the_phase_that_it_is_given(manager: Any) -> None:
    opened = journal.begin(manager, MOVE, Phase.CUTOVER)
    assert (opened.move, opened.phase) == (MOVE, Phase.CUTOVER)
    left = journal.read(manager)
    assert left is not None and left.phase is Phase.CUTOVER


@pytest.mark.parametrize("lost", [[], [True], [False], [False, True]])
def test_an_election_in_the_middle_of_a_word_is_no_other_run(manager: Any, lost: list[bool]) -> None:
    opened = journal.begin(manager, MOVE)
    manager.lost = lost
    opened.advance(Phase.STOP)
    assert opened.phase is Phase.STOP
    opened.advance(Phase.CUTOVER)
    assert opened.phase is Phase.CUTOVER


@pytest.mark.parametrize("lost", [[], [True]])
@pytest.mark.parametrize("phase", [Phase.BACK, Phase.CUTOVER])
def test_of_two_runs_one_goes_on_also_when_both_want_the_same(manager: Any, phase: Phase, lost: list[bool]) -> None:
    first = journal.begin(manager, MOVE)
    second = journal.read(manager)
    assert second is not None
    first.advance(phase)
    manager.lost = lost
    with pytest.raises(Overtaken):
        second.advance(phase)


def test_a_journal_that_is_gone_was_ended_by_somebody_else(manager: Any) -> None:
    opened = journal.begin(manager, MOVE)
    manager.kept = None
    with pytest.raises(Overtaken):
        opened.advance(Phase.STOP)
