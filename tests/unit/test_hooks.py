"""``mail.hooks``: the operator's program that lets the public address follow."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarmmail.mail import hooks
from swarmmail.model import inventory
from swarmmail.model.errors import HostError


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """What the inventory names; it writes down what it is told."""
    path = tmp_path / "move-address"
    path.write_text('#!/bin/sh\necho "$@" >>"${0%/*}/log"\n')
    path.chmod(0o755)
    return path


def hook(folder: Path, role: str, name: str | None = "move-address") -> tuple[Any, Any, Any]:
    """The hooks of a service, and two hosts."""
    path = folder / "lab.yml"
    path.write_text(
        "cluster: lab\n"
        "hosts:\n"
        "  host1: {address: 10.1.0.1, role: manager}\n"
        "  host2: {address: h2.lab, advertise: 10.1.0.2, role: worker}\n"
        "stack: {path: ., settings: {MAIL_HOSTNAME: mx.lab.test}" + (f", address_hook: {name}" if name else "") + "}\n"
    )
    loaded = inventory.load(path)
    source, target = (SimpleNamespace(name=spec.name, spec=spec) for spec in loaded.hosts.values())
    return hooks.of(SimpleNamespace(inventory=loaded), None, role), source, target  # type: ignore[arg-type]


@pytest.mark.parametrize(("said", "looks"), [("nsenter: cannot open /proc/7/ns/ipc: No such file", 2), ("no", 1)])
def test_a_container_that_was_replaced_is_looked_for_once_more(said: str, looks: int) -> None:
    class Host:
        def run(self, command: str, **_: object) -> Any:
            if "-t 7 " in command:
                raise HostError(said, host="host1")
            return SimpleNamespace(stdout=command)

    found: list[str] = []

    class Mda(hooks.Mda):
        def _find(self, role: str) -> Any:
            if role not in self._found:
                found.append(role)
                self._found[role] = SimpleNamespace(host=Host()), 6 + len(found)  # type: ignore[assignment]
            return self._found[role]

    mda = Mda(None, None)  # type: ignore[arg-type]
    if looks == 2:
        assert mda._inside("true", step="try").startswith("nsenter -t 8 ")
    else:
        with pytest.raises(HostError, match="no"):
            mda._inside("true", step="try")
    assert found == ["mta"] * looks


@pytest.mark.parametrize("role", ["mta", "edge"])
def test_it_is_told_what_has_moved_from_where_to_where(program: Path, role: str) -> None:
    which, source, target = hook(program.parent, role)
    assert which.address_hook == program
    which.follow(source, target)
    assert (program.parent / "log").read_text() == f"{role} host1 host2 10.1.0.1 h2.lab\n"


@pytest.mark.parametrize("role", ["mda", ""])
def test_what_the_world_does_not_connect_to_has_no_public_address(program: Path, role: str) -> None:
    which, source, target = hook(program.parent, role)
    which.follow(source, target)
    assert which.address_hook is None and not (program.parent / "log").exists()


def test_people_are_told_what_they_have_to_do_or_what_is_done_for_them(program: Path) -> None:
    which, source, target = hook(program.parent, "mta", None)
    which.follow(source, target)
    assert which.before(target)[0].startswith("the public address moves, too: make mx.lab.test lead to h2.lab (DNS")
    which, _, target = hook(program.parent, "mta")
    assert f"too: {program} will be run to make mx.lab.test lead to h2.lab. Senders" in which.before(target)[0]
    which, _, target = hook(program.parent, "edge")
    assert "make the name that mail programs use lead to h2.lab. Mail programs that were" in which.before(target)[0]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("#!/bin/sh\necho first; echo 'no quota' >&2; exit 3\n", "exit status 3: no quota"),
        ("#!/bin/sh\nprintf 'a\\033[31mb\\n\\n'; exit 1\n", r"exit status 1: a\[31mb"),
        ("#!/bin/sh\nexit 1\n", "exit status 1: no message"),
        ("#!/nowhere\n", "can't be run: No such file or directory"),
        ("#!/bin/sh\nkill -TERM $$\n", "exit status -15: no message"),
    ],
)
def test_a_hook_that_fails_says_why_and_what_to_do_by_hand(program: Path, script: str, why: str) -> None:
    program.write_text(script)
    which, source, target = hook(program.parent, "edge")
    by_hand = "make the name that mail programs use lead to h2.lab by hand, or mend it and run: "
    with pytest.raises(HostError, match=f"^host2, address hook: move-address: {why} -> {by_hand}") as caught:
        which.follow(source, target)
    assert str(caught.value).endswith(f"run: {program} edge host1 host2 10.1.0.1 h2.lab")
    assert "\n" not in str(caught.value)


def test_one_that_hangs_is_ended_with_all_that_it_has_started(program: Path) -> None:
    program.write_text('#!/bin/sh\n(sleep 2; echo late >"${0%/*}/log") & sleep 60\n')
    began = time.monotonic()
    assert hooks.last_words([str(program)], 0.3) == "took longer than 0.3 s and was ended"
    assert time.monotonic() - began < 2
    time.sleep(2.2)
    assert not (program.parent / "log").exists()


def test_what_a_hook_leaves_running_is_not_waited_for(program: Path) -> None:
    program.write_text("#!/bin/sh\nsleep 5 &\n")
    began = time.monotonic()
    assert hooks.last_words([str(program)], 30) == "" and time.monotonic() - began < 3


def test_it_has_no_input(program: Path) -> None:
    program.write_text("#!/bin/sh\nread -r line; exit $(($? == 0))\n")
    assert hooks.last_words([str(program)], 10) == ""
