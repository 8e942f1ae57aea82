"""``cluster.lock``: one operator at a time. The folder's commands run for real, in a folder of the test; the Swarm is
a store of configs that refuses a second one of the same name, as Docker does."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from swarmmail.cluster import lock
from swarmmail.hosts.connection import Result
from swarmmail.hosts.dockerapi import NO_LEADER
from swarmmail.model.errors import HostError, Locked

MINE = "fab bootstrap"


class Configs:
    """The part of Docker's API that deals with configs."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.ids: dict[str, str] = {}
        self.made = itertools.count()
        self.lock = threading.Lock()
        self.leaderless = 0

    def _elect(self) -> None:
        if self.leaderless:
            self.leaderless -= 1
            words = NO_LEADER[self.leaderless % len(NO_LEADER)]
            raise docker.errors.APIError(f"rpc error: code = Unknown desc = the node {words}")

    def create_config(self, name: str, data: bytes) -> None:
        self._elect()
        with self.lock:
            if name in self.kept:
                raise docker.errors.APIError("rpc error: code = AlreadyExists desc = config x already exists")
            self.kept[name] = data
            self.ids[name] = f"id{next(self.made)}"

    def configs(self, filters: dict[str, str]) -> list[dict[str, Any]]:
        """Docker's filter by name is one by prefix."""
        self._elect()
        return [
            {"ID": self.ids.get(name, name), "Spec": {"Name": name, "Data": base64.b64encode(data).decode()}}
            for name, data in self.kept.items()
            if name.startswith(filters["name"])
        ]

    def remove_config(self, wanted: str) -> None:
        self._elect()
        with self.lock:
            names = [name for name in self.kept if wanted in (name, self.ids.get(name, name))]
            if not names:
                raise docker.errors.NotFound("no such config")
            del self.kept[names[0]]


class Host:
    """A host whose commands run here, as far as the lock needs them."""

    name = "host1"

    def __init__(self) -> None:
        self.docker = Configs()

    def run(self, command: str, *, stdin: str = "", check: bool = True, **_: object) -> Any:
        done = subprocess.run(["sh", "-c", command], input=stdin, capture_output=True, text=True, check=check)
        return Result(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def doing(self, step: str) -> Iterator[None]:
        yield


@pytest.fixture(params=[False, True], ids=["folder", "swarm"])
def swarm(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(lock, "FOLDER", str(tmp_path / "lock"))
    return Host()


@pytest.fixture
def dead() -> lock.Owner:
    """A run of this machine that was killed."""
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = replace(lock.me("fab deploy"), pid=process.pid, started=lock._started(process.pid))
        assert not lock.is_dead(owner)
        process.kill()
    return owner


def write(host: Any, swarm: bool, owner: lock.Owner | str) -> None:
    """Somebody takes the lock."""
    if isinstance(owner, lock.Owner):
        assert lock._take(host, owner, swarm)
    elif swarm:
        host.docker.kept[lock.NAME] = owner.encode()
    else:
        Path(lock.FOLDER).mkdir()
        (Path(lock.FOLDER) / "owner").write_text(owner)


def test_it_is_held_and_let_go(host: Any, swarm: bool) -> None:
    assert lock.read(host, swarm) is None
    with lock.held(host, MINE, swarm=swarm):
        owner = lock.read(host, swarm)
        assert owner is not None
        assert (owner.pid, owner.task, owner.started) == (os.getpid(), MINE, lock._started(os.getpid()))
    assert lock.read(host, swarm) is None
    with lock.held(host, MINE, swarm=swarm):
        pass


def test_it_is_let_go_after_an_error(host: Any, swarm: bool) -> None:
    with pytest.raises(ZeroDivisionError), lock.held(host, MINE, swarm=swarm):
        raise ZeroDivisionError
    assert lock.read(host, swarm) is None


def test_a_second_operator_is_told_who_since_when_and_what_to_do(host: Any, swarm: bool) -> None:
    write(host, swarm, replace(lock.me("fab deploy"), user="ada", machine="elsewhere", pid=77, since=time.time() - 300))
    with pytest.raises(Locked) as locked, lock.held(host, MINE, swarm=swarm):
        pytest.fail("two at once")
    assert str(locked.value) == (
        "host1, lock: ada@elsewhere (process 77) has been at work on 'fab deploy' for 5 min -> wait; if that run is "
        "dead for certain: fab lock.break"
    )
    owner = lock.read(host, swarm)
    assert owner is not None
    assert owner.user == "ada"


def test_a_run_that_was_killed_here_is_followed(
    host: Any, swarm: bool, dead: lock.Owner, capfd: pytest.CaptureFixture[str]
) -> None:
    write(host, swarm, dead)
    with lock.held(host, MINE, swarm=swarm):
        owner = lock.read(host, swarm)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert "fab deploy" in "".join(capfd.readouterr()), "it is said"


@pytest.mark.parametrize(
    ("changes", "dead"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),  # above the highest process id there can be (proc_sys_kernel(5))
        ({"started": "1"}, True),  # the id was given to another process meanwhile
        ({"pid": 2**22 + 1, "machine": "elsewhere"}, False),
        ({"pid": 2**22 + 1, "boot": "another"}, False),
        ({"pid": 2**22 + 1, "boot": ""}, False),
    ],
)
def test_only_what_is_certain_is_called_dead(changes: dict[str, Any], dead: bool) -> None:
    assert lock.is_dead(replace(lock.me(MINE), **changes)) is dead


def test_without_a_boot_id_nothing_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_boot", lambda: "")
    assert not lock.is_dead(replace(lock.me(MINE), pid=2**22 + 1))


@pytest.mark.parametrize("text", ["", "{", "null", '{"user": "ada"}', '{"a later version": 1}'])
def test_a_lock_that_cannot_be_read_holds(host: Any, swarm: bool, text: str) -> None:
    write(host, swarm, text)
    with pytest.raises(Locked, match="somebody has just taken the lock"), lock.held(host, MINE, swarm=swarm):
        pytest.fail("two at once")


def test_who_lost_the_lock_does_not_take_away_the_next_ones(host: Any, swarm: bool) -> None:
    other = replace(lock.me("fab deploy"), machine="elsewhere")
    with lock.held(host, MINE, swarm=swarm):
        lock.release(host, swarm, None)
        write(host, swarm, other)
    assert lock.read(host, swarm) == other


def test_a_lock_that_was_taken_over_by_another_run_meanwhile_stays(
    host: Any, swarm: bool, dead: lock.Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs have read the same dead owner; the other one was faster, between our look and our removal."""
    write(host, swarm, dead)
    other = replace(lock.me("fab deploy"), token="faster")
    if swarm:
        look = lock._config

        def slow(manager: Any) -> tuple[str, lock.Owner | None]:
            found = look(manager)
            host.docker.remove_config(lock.NAME)
            write(host, swarm, other)
            return found

        monkeypatch.setattr(lock, "_config", slow)
        lock.release(host, swarm, dead.token)
        monkeypatch.undo()
    else:
        lock.release(host, swarm, dead.token)
        write(host, swarm, other)
        lock.release(host, swarm, dead.token)
    assert host.docker.kept if swarm else (Path(lock.FOLDER) / "owner").exists()
    assert lock.read(host, swarm) == other


def test_many_runs_take_over_the_same_dead_lock_and_one_gets_it(
    host: Any, swarm: bool, dead: lock.Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "me", lambda task, me=lock.me: replace(me(task), pid=os.getpid()))
    start, inside = threading.Barrier(8), []

    def take(number: int) -> bool:
        start.wait()
        try:
            with lock.held(host, f"task {number}", swarm=swarm):
                inside.append(number)
                assert len(inside) == 1, "two at once"
                time.sleep(0.05)
                inside.remove(number)
                return True
        except Locked:
            return False

    write(host, swarm, dead)
    with ThreadPoolExecutor(max_workers=8) as pool:
        assert any(pool.map(take, range(8)))
    assert lock.read(host, swarm) is None


def test_a_folder_that_cannot_be_made_is_not_taken_for_a_held_lock(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "FOLDER", str(tmp_path / "no such folder" / "lock").replace(" ", "-"))
    with (
        pytest.raises(HostError, match=r"host1, take the lock: mktemp: .*No such file"),
        lock.held(host, MINE, swarm=False),
    ):
        pytest.fail("without a lock")


def test_it_is_broken_by_decision_only(host: Any, swarm: bool) -> None:
    write(host, swarm, replace(lock.me("fab deploy"), machine="elsewhere"))
    lock.release(host, swarm, "another token")
    assert lock.read(host, swarm) is not None
    lock.release(host, swarm, None)
    assert lock.read(host, swarm) is None
    lock.release(host, swarm, None)


def test_of_many_one_gets_it(host: Any, swarm: bool) -> None:
    start = threading.Barrier(12)

    def take(number: int) -> bool:
        owner = replace(lock.me(f"task {number}"), token=str(number))
        start.wait()
        return lock._take(host, owner, swarm)

    with ThreadPoolExecutor(max_workers=12) as pool:
        taken = list(pool.map(take, range(12)))
    assert taken.count(True) == 1
    owner = lock.read(host, swarm)
    assert owner is not None
    assert owner.token == str(taken.index(True))


def test_an_empty_folder_is_no_free_lock(host: Any, tmp_path: Path) -> None:
    """As it never appears half made, an empty one was put there by somebody."""
    Path(lock.FOLDER).mkdir()
    assert not lock._take(host, lock.me(MINE), False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"], "nothing is left of the try"


def test_a_config_of_nearly_the_same_name_is_no_lock(host: Any) -> None:
    host.docker.kept[lock.NAME + "-2"] = b"{}"
    assert lock.read(host, True) is None
    with lock.held(host, MINE, swarm=True):
        pass
    assert list(host.docker.kept) == [lock.NAME + "-2"]


def test_another_error_of_docker_is_not_taken_for_a_held_lock(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, data: bytes) -> None:
        raise docker.errors.APIError("This node is not a swarm manager.")

    monkeypatch.setattr(host.docker, "create_config", refuse)
    with pytest.raises(docker.errors.APIError), lock.held(host, MINE, swarm=True):
        pytest.fail("without a lock")


def test_an_election_of_managers_is_waited_for(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait_fixed", lambda seconds: lambda state: 0)
    host.docker.leaderless = 3
    with lock.held(host, MINE, swarm=True):
        assert lock.NAME in host.docker.kept
        host.docker.leaderless = 3
    assert host.docker.kept == {}


def test_what_went_wrong_is_not_hidden_by_a_lock_that_can_not_be_released(
    host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: object) -> None:
        raise HostError("connection lost", host="host1", step="release the lock")

    monkeypatch.setattr(lock, "release", lost)
    with pytest.raises(ValueError, match="the cause"), lock.held(host, MINE, swarm=True):
        raise ValueError("the cause")
    assert "host1, release the lock: connection lost" in capsys.readouterr().err
    host.docker.kept.clear()
    with pytest.raises(HostError, match="connection lost"), lock.held(host, MINE, swarm=True):
        """Nothing else went wrong."""


def test_a_lock_whose_answer_was_lost_is_ours(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = lock.me(MINE)
    monkeypatch.setattr(lock, "me", lambda task: owner)
    write(host, True, owner)
    with lock.held(host, MINE, swarm=True):
        pass
    assert host.docker.kept == {}


def test_nothing_secret_is_in_a_lock() -> None:
    assert set(asdict(lock.me(MINE))) == {"user", "machine", "boot", "pid", "started", "task", "since", "token"}
