"""One operator at a time (invariant 7): a Swarm config whose name can exist only once.

Before there is a Swarm, and while one is being made, a directory under /run of the lead host does the same;
``mkdir`` is atomic. A lock tells who holds it and since when. It is taken over only when its holder is proven
dead: same machine, and no such process any more. Anything else is explained, never stolen.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import platform
import secrets
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from getpass import getuser
from pathlib import Path

import docker.errors

from swarmmail import report
from swarmmail.hosts.connection import Host
from swarmmail.hosts.dockerapi import patiently
from swarmmail.model.errors import HostError, Locked, SwarmmailError

NAME = "swarmmail-lock"
FOLDER = "/run/swarmmail-lock"


@dataclass(frozen=True)
class Owner:
    """Who is at work. ``started`` (clock ticks since boot) tells a process from a later one of the same id."""

    user: str
    machine: str
    boot: str
    pid: int
    started: str
    task: str
    since: float
    token: str

    @property
    def text(self) -> str:
        minutes = max(0.0, (time.time() - self.since) / 60)
        age = f"{minutes:.0f} min" if minutes >= 1 else f"{minutes * 60:.0f} s"
        return f"{self.user}@{self.machine} (process {self.pid}) has been at work on '{self.task}' for {age}"


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> str:
    """Start time of a process (field 22 of proc_pid_stat(5)); empty when there is none."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def me(task: str) -> Owner:
    pid = os.getpid()
    user = getuser()
    return Owner(user, platform.node(), _boot(), pid, _started(pid), task, time.time(), secrets.token_hex(8))


def is_dead(owner: Owner) -> bool:
    """True only if it is certain: this machine, this boot, and that process is gone."""
    here = (owner.machine, owner.boot) == (platform.node(), _boot()) and bool(owner.boot)
    return here and _started(owner.pid) != owner.started


def _parse(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def read(manager: Host, swarm: bool) -> Owner | None:
    """Who holds the lock; None when it is free (or has just been taken and not yet signed)."""
    if not swarm:
        return _parse(manager.run(f"cat {FOLDER}/owner 2>/dev/null || true", step="read the lock").stdout)
    return _config(manager)[1]


def _config(manager: Host) -> tuple[str, Owner | None]:
    """Id and owner of the config that is the lock; an empty id when there is none."""
    with manager.doing("read the lock"):
        found = [c for c in manager.docker.configs(filters={"name": NAME}) if c["Spec"]["Name"] == NAME]
        if not found:
            return "", None
        return found[0]["ID"], _parse(base64.b64decode(found[0]["Spec"].get("Data", "")).decode())


_HELD = 3  # exit status


def _take(manager: Host, owner: Owner, swarm: bool) -> bool:
    """False: somebody holds it.

    Raises:
        HostError: it could not be tried.
    """
    text = json.dumps(asdict(owner))
    if not swarm:
        # written in full before it appears: a rename onto a missing directory is atomic
        command = (
            f"d=$(mktemp -d {FOLDER}.XXXXXX) || exit 1; cat >$d/owner || {{ rm -rf $d; exit 1; }}; "
            f"mv -nT $d {FOLDER}; [ ! -d $d ] || {{ rm -rf $d; exit {_HELD}; }}"
        )
        result = manager.run(command, stdin=text, step="take the lock", check=False)
        if not result.ok and result.status != _HELD:
            words = result.stderr.strip().splitlines() or [f"exit status {result.status}"]
            raise HostError(words[-1], host=manager.name, step="take the lock", hint=f"can {FOLDER} be made there?")
        return result.ok
    with manager.doing("take the lock"):
        try:
            manager.docker.create_config(NAME, text.encode())
        except docker.errors.APIError as error:
            if error.status_code == 409 or "already exists" in str(error):
                return False
            raise
    return True


def release(manager: Host, swarm: bool, token: str | None) -> None:
    """Let go of the lock: one's own or a dead run's by ``token``, or whoever's it is (None: the operator decided).

    Never one that somebody took meanwhile: a config is removed by the id that was read with the token, the folder
    by who holds its flock(1), so that nobody else removes it between the look and the removal."""
    if not swarm:
        mine = (
            f"grep -qsF {shlex.quote(json.dumps({'token': token})[1:-1])} {FOLDER}/owner &&"
            if token is not None
            else ""
        )
        manager.run(
            f"[ -d {FOLDER} ] || exit 0\n"
            f"{{ flock -w 10 9 || exit 1; {mine} mv -T {FOLDER} {FOLDER}.$$ && rm -rf {FOLDER}.$$; }} 9<{FOLDER}\n:",
            step="release the lock",
        )
        return
    found, owner = _config(manager)
    if not found or (token is not None and (owner is None or owner.token != token)):
        return
    with manager.doing("release the lock"), contextlib.suppress(docker.errors.NotFound):
        manager.docker.remove_config(found)


@contextlib.contextmanager
def held(manager: Host, task: str, *, swarm: bool) -> Iterator[None]:
    """Hold the lock for the length of a block.

    Raises:
        Locked: somebody else holds it; the text says who, since when, and what to do.
    """
    owner = me(task)
    while not patiently(lambda: _take(manager, owner, swarm)):
        other = read(manager, swarm)
        if other is not None and other.token == owner.token:
            break  # taken by a try whose answer was lost
        if other is not None and is_dead(other):
            report.warning(f"an earlier run ({other.text}) ended without a word; its lock is taken over")
            patiently(functools.partial(release, manager, swarm, other.token))
            continue
        raise Locked(
            other.text if other else "somebody has just taken the lock",
            host=manager.name,
            step="lock",
            hint="wait; if that run is dead for certain: fab lock.break",
        )
    done = False
    try:
        yield
        done = True
    finally:
        try:
            patiently(lambda: release(manager, swarm, owner.token))
        except SwarmmailError as error:
            if done:
                raise
            report.warning(f"{error}; the next run takes the lock over")  # what went wrong before is what people need
