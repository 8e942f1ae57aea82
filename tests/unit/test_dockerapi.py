"""``hosts.dockerapi`` and elections: the SDK's own client, with an engine that answers from a list."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import docker
import docker.errors
import pytest
import requests

from swarmmail.hosts import dockerapi
from swarmmail.hosts.dockerapi import ELECTION, LEADERLESS, NO_LEADER, at_once

Answer = tuple[int, Any]
UNSURE = [words for words in NO_LEADER if words != LEADERLESS]


def failed(words: str) -> Answer:
    return 503, {"message": f"rpc error: code = Unknown desc = {words}"}


class Engine(requests.adapters.BaseAdapter):
    """Answers in turn, the last one for ever; what was asked is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self.asked: list[str] = []

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        path = request.path_url.split("?")[0].split("/", 2)[-1]
        answer: Answer = (200, {"ApiVersion": "1.41"})
        if path != "version":
            self.asked.append(f"{request.method} {path}")
            answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        response = requests.Response()
        response.status_code, response.request, response.url = answer[0], request, str(request.url)
        response.raw = io.BytesIO(json.dumps(answer[1]).encode())
        return response

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """No test waits: time goes by in pauses alone."""
    made, now = Engine(), [0.0]
    monkeypatch.setattr(dockerapi, "_Adapter", lambda _: made)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return made


@pytest.fixture
def api(engine: Engine) -> docker.APIClient:
    return dockerapi.client(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", NO_LEADER)
@pytest.mark.parametrize("what", ["services", "tasks", "configs", "secrets", "nodes"])
def test_what_only_reads_waits_for_an_election(engine: Engine, api: docker.APIClient, words: str, what: str) -> None:
    engine.answers = [failed(words), failed(words), (200, [])]
    assert getattr(api, what)() == []
    assert engine.asked == [f"GET {what}"] * 3


def test_a_write_is_made_again_only_if_it_was_certainly_not_done(engine: Engine, api: docker.APIClient) -> None:
    engine.answers = [failed(LEADERLESS), (201, {"ID": "x"})]
    assert api.create_config("x", b"")["ID"] == "x"
    assert engine.asked == ["POST configs/create"] * 2


@pytest.mark.parametrize("words", UNSURE)
@pytest.mark.parametrize("write", [lambda api: api.create_config("x", b""), lambda api: api.remove_service("x")])
def test_a_write_that_may_be_done_is_left_to_who_asked_for_it(
    engine: Engine, api: docker.APIClient, words: str, write: Callable[[docker.APIClient], object]
) -> None:
    engine.answers = [failed(words), (201, {"ID": "x"})]
    with pytest.raises(docker.errors.APIError, match=words):
        write(api)
    assert len(engine.asked) == 1


def test_what_can_be_done_again_waits_also_then(engine: Engine, api: docker.APIClient) -> None:
    engine.answers = [*map(failed, UNSURE), (201, {"ID": "x"})]
    assert dockerapi.patiently(lambda: api.create_config("x", b""))["ID"] == "x"
    assert len(engine.asked) == 1 + len(UNSURE)


@pytest.mark.parametrize("answer", [(500, {"message": "no space left on device"}), (404, {"message": "not found"})])
def test_other_errors_are_none_of_an_election(engine: Engine, api: docker.APIClient, answer: Answer) -> None:
    engine.answers = [answer]
    with pytest.raises(docker.errors.APIError, match=answer[1]["message"]):
        api.services()
    assert len(engine.asked) == 1


def test_an_election_that_does_not_end_is_an_error_in_time(engine: Engine, api: docker.APIClient) -> None:
    engine.answers = [failed(LEADERLESS)]
    with pytest.raises(docker.errors.APIError, match=LEADERLESS):
        api.services()
    assert len(engine.asked) == pytest.approx(ELECTION / 0.5, abs=2)


def test_who_wants_to_know_of_a_leader_is_told_at_once(engine: Engine, api: docker.APIClient) -> None:
    engine.answers = [failed(LEADERLESS)]
    with at_once(), pytest.raises(docker.errors.APIError, match=LEADERLESS):
        api.services()
    assert len(engine.asked) == 1
    engine.answers = [failed(LEADERLESS), (200, [])]
    assert api.services() == []  # the block is left
