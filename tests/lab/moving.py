"""What the tests of moves share, with those that run for hours: where a service is, what a move may never leave, and
what can go wrong in the middle of one."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import docker.errors
from conftest import DRIVER, HOSTS, MAIL, STACK, Project, Result, eventually, temporary
from mailing import account, container, volume

from swarmmail import report
from swarmmail.model import move as model

STEPS = tuple(step.name for step in model.steps("mda", "", ""))
USERS = ("ann@lab.test", "bob@lab.test", "cid@lab.test")
READER = "eve@lab.test"
"""Whose mailbox the IMAP clients use."""
NO_PROOF = "--no-verify"
"""The proof of encryption at the end has tests of its own."""


def accounts_for(project: Project) -> None:
    known = project.fab("user.list", "--inventory", MAIL, check=0).stdout.split()
    for user in (*USERS, READER):
        if user not in known:
            account(project, user.split("@")[0])


@contextlib.contextmanager
def own_lab(name: str) -> Iterator[Project]:
    """Three hosts with the mail stack, for a program that is no test; SIGTERM takes them away, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder, temporary(Path(folder), name) as project:
        project.up(3, driver=DRIVER)
        project.inventory(MAIL, stack=STACK)
        project.fab("bootstrap", "deploy", env={"SWARMMAIL_INVENTORY": MAIL}, timeout=600, check=0)
        yield project


def place(project: Project, service: str = "mail_mda") -> str:
    """The one host where the volume of a service is live."""
    name = {"mail_mda": "mail_mail", "mail_mta": "mail_queue"}[service]
    look = f"cat /var/lib/docker/volumes/{name}/_data/.swarmmail-volume 2>/dev/null || true"
    [host] = [h for h in HOSTS if "state=live\n" in project.sh(h, look)]
    return host


def labelled(project: Project, label: str = "swarmmail.mda") -> list[str]:
    nodes = project.host("host1").docker.nodes()
    return [node["Spec"]["Labels"]["swarmmail.host"] for node in nodes if node["Spec"]["Labels"].get(label) == "true"]


def other(host: str) -> str:
    return "host2" if host == "host3" else "host3"


def migrate(project: Project, to: str, *words: str, service: str = "mda", **options: Any) -> Result:
    given = ("--service", service, "--to", to, "--inventory", MAIL, NO_PROOF, *words)
    return project.fab("migrate", *given, timeout=300, **options)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Until a run says a line with that in it; when it ends before, the test fails with all that it said."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return
    raise AssertionError(f"it ended before it said '{text}':\n{said}")


def has_begun(project: Project) -> bool:
    return any(c["Spec"]["Name"] == model.JOURNAL for c in project.host("host1").docker.configs())


def clean(project: Project) -> None:
    """What no move may leave, wherever it ended."""
    for host in HOSTS:
        assert project.sh(host, "ls -d /run/swarmmail-move-* 2>/dev/null || true") == ""
        assert project.sh(host, "grep -c swarmmail-move /root/.ssh/authorized_keys || true") == "0\n"
        assert project.sh(host, "pgrep -a rsync || true") == ""
    assert labelled(project) == [place(project)]
    assert not [
        c for c in project.host("host1").docker.configs() if c["Spec"]["Name"] in (model.JOURNAL, "swarmmail-lock")
    ]
    mta = container(project, "host1", "mail_mta")
    assert project.sh("host1", f"docker exec {mta} postconf -h defer_transports") == "\n"


# ---- what goes wrong ----


@dataclass(frozen=True)
class Scene:
    """A move under way."""

    project: Project
    source: str
    target: str
    process: subprocess.Popen[str]

    def node(self, words: str, host: str) -> None:
        """By hand. A label that the move itself has taken off already is no failure of that hand."""
        node = f"$(docker node ls -qf node.label=swarmmail.host={host})"
        said = self.project.sh("host1", f"docker node update {words} {node} || true")
        assert said.strip().isalnum() or "doesn't exist in node's labels" in said, said


Act = Callable[[Scene], None]


@dataclass(frozen=True)
class Fault:
    """``do`` comes when the step ``after`` is done (empty: when it has begun); ``mend`` when the run has ended."""

    after: str
    do: Act
    mend: Act = lambda scene: None
    slow: bool = False
    """The copy takes some seconds: the fault meets it."""
    prepare: Callable[[Project, str], None] = lambda project, target: None
    ends: tuple[str, ...] = ("moved", "undone")
    """Of the run itself: it did it, it undid it, or it said that somebody has to go on."""
    strict: bool = True
    """Its status is 0 if and only if it moved. Not so where the target may have been hurt after the cutover, or a host
    was cut off that the last look is made from."""


def _on(which: str, script: str) -> Act:
    def do(scene: Scene) -> None:
        scene.project.sh(getattr(scene, which, which), script)

    return do


def _rsync_gets(signal: str, which: str) -> Act:
    def do(scene: Scene) -> None:
        host = getattr(scene, which)
        words = f"pkill -{signal} -x rsync && echo yes || true"
        eventually(lambda: scene.project.sh(host, words), 30, "rsync runs there")

    return do


def _gone(which: str) -> Act:
    return lambda scene: scene.project.stop(getattr(scene, which))


def _whole_again(scene: Scene) -> None:
    scene.project.up(3)
    eventually(
        lambda: scene.project.bootstrap(MAIL, NO_PROOF, timeout=240).status == 0, 180, "the cluster is whole again"
    )


def _interrupt(scene: Scene) -> None:
    scene.process.send_signal(signal.SIGINT)


def _interrupt_twice(scene: Scene) -> None:
    _interrupt(scene)
    time.sleep(0.2)
    _interrupt(scene)


NO_HOLDER = "docker rm -f $(docker ps -aqf label=swarmmail.holder) >/dev/null 2>&1"


def _small_disk(project: Project, target: str) -> None:
    path = volume(project, target, "mail_mail")
    if not path:
        path = project.host(target).docker.create_volume("mail_mail")["Mountpoint"]
    project.sh(
        target,
        f"{NO_HOLDER}; cp -a {path}/.swarmmail-volume /run/kept 2>/dev/null; mount -t tmpfs -o size=256m none {path}; "
        f"mv /run/kept {path}/.swarmmail-volume 2>/dev/null; true",
    )


def _fill(scene: Scene) -> None:
    path = volume(scene.project, scene.target, "mail_mail")
    scene.project.sh(scene.target, f"cat /dev/zero >{path}/zeros 2>/dev/null; true")


def _large_disk(scene: Scene) -> None:
    path = volume(scene.project, scene.target, "mail_mail")
    scene.project.sh(
        scene.target,
        f"{NO_HOLDER}; cp {path}/.swarmmail-volume /run/kept; umount -l {path}; mv /run/kept {path}/.swarmmail-volume",
    )


RESTART = "systemctl restart docker"
UPDATE = "docker service update -d --force mail_mda"


def dropping(*rules: str) -> str:
    """An nft script in a table of its own, ``planted``; each rule begins with ``in`` or ``out``."""
    chains = "".join(
        f"add chain inet planted {way} {{ type filter hook {way}put priority -400; }}; " for way in ("in", "out")
    )
    return f"nft 'add table inet planted; {chains}{'; '.join(f'add rule inet planted {rule} drop' for rule in rules)}'"


def _dropping_for(seconds: int, *rules: str) -> str:
    return f"{dropping(*rules)}; (sleep {seconds}; nft delete table inet planted) >/dev/null 2>&1 &"


@contextlib.contextmanager
def planted(project: Project, host: str, service: str, rule: str) -> Iterator[None]:
    """A rule that drops packets in the network of a service's container, for a while."""
    found = container(project, host, service)
    inside = f"nsenter -t $(docker inspect -f '{{{{.State.Pid}}}}' {found}) -n"
    project.sh(host, f"{inside} {dropping(rule)}")
    try:
        yield
    finally:
        project.sh(host, f"{inside} nft delete table inet planted")


DEPLOY = "stack deploy -c - mail"


def _by_hand(words: str) -> Act:
    """What somebody may type at a manager, with the stack's own file. Docker may refuse it."""

    def do(scene: Scene) -> None:
        project = scene.project
        settings = " ".join(f"{name}={value}" for name, value in STACK["settings"].items())
        text = (project.root / "stacks" / "mail" / "stack.yml").read_text()
        said = project.sh("host1", f"{settings} docker {words} <<'END'\n{text}\nEND", check=False)
        report.progress(f"docker {words}: {said.strip()}")

    return do


def _cut(seconds: int) -> Act:
    """The way from source to target, for some seconds."""

    def do(scene: Scene) -> None:
        address = scene.project.address(scene.source)
        scene.project.sh(scene.target, _dropping_for(seconds, f"in ip saddr {address} tcp dport 22"))

    return do


ALONE = _dropping_for(15, "in iifname != lo", "out oifname != lo")
"""Nothing comes in and nothing gets out, for some seconds: neither the operator's SSH nor the Swarm's own words."""
ANY = ("undone", "left", "moved")
HANG_UP = "pkill -x sshd-session"

FAULTS = {
    "rsync killed on the source": Fault("prepare", _rsync_gets("KILL", "source"), slow=True),
    "rsync killed on the target": Fault("prepare", _rsync_gets("KILL", "target"), slow=True, ends=("moved",)),
    "rsync hangs on the target": Fault("prepare", _rsync_gets("STOP", "target"), slow=True, ends=("moved",)),
    "the way between them cut for a moment": Fault("prepare", _cut(5), slow=True, ends=("moved",)),
    "the way between them cut": Fault("prepare", _cut(60), slow=True, ends=("undone",)),
    "target full": Fault("prepare", _fill, _large_disk, slow=True, prepare=_small_disk, ends=("undone",)),
    "Docker restarted on the source": Fault("prepare", _on("source", RESTART), slow=True),
    "Docker restarted on the target": Fault("prepare", _on("target", RESTART), slow=True),
    "Docker restarted on the target, which stands by": Fault("standby", _on("target", RESTART)),
    "target gone": Fault("precopy", _gone("target"), _whole_again, ends=("undone", "left")),
    "source gone": Fault("standby", _gone("source"), _whole_again, ends=ANY),
    "the manager cut off for a moment": Fault("standby", _on("host1", ALONE), _whole_again, ends=ANY, strict=False),
    "the source cut off for a moment": Fault("standby", _on("source", ALONE), _whole_again, ends=ANY, strict=False),
    "the operator's connection to the source lost": Fault("prepare", _on("source", HANG_UP), slow=True, ends=ANY),
    "the operator's connection to the manager lost": Fault("standby", _on("host1", HANG_UP), ends=ANY),
    "interrupted": Fault("precopy", _interrupt, ends=("undone",)),
    "interrupted twice": Fault("standby", _interrupt_twice, ends=ANY),
    "the label taken off the source by hand": Fault(
        "standby", lambda scene: scene.node("--label-rm swarmmail.mda", scene.source)
    ),
    "the label taken off the target by hand": Fault(
        "standby", lambda scene: scene.node("--label-rm swarmmail.mda", scene.target)
    ),
    "the label put on another host by hand": Fault(
        "standby",
        lambda scene: scene.node("--label-add swarmmail.mda=true", "host1"),
        lambda scene: scene.node("--label-rm swarmmail.mda", "host1"),
    ),
    "the service updated by hand": Fault("prepare", _on("host1", UPDATE), slow=True),
    "the service updated by hand, the target stands by": Fault("standby", _on("host1", UPDATE)),
    "the stack's file deployed by hand": Fault("prepare", _by_hand(DEPLOY), slow=True),
    "the stack's file deployed by hand, the target stands by": Fault("standby", _by_hand(DEPLOY)),
    "the service scaled by hand": Fault("standby", _by_hand("service scale mail_mda=2")),
    "all pruned by hand": Fault(
        "prepare",
        _on("target", "docker system prune -af --volumes; docker volume prune -af"),
        slow=True,
        ends=("moved",),
    ),
}
FAULTS |= {
    f"killed {'after ' + step if step else 'at the beginning'}": Fault(
        step, lambda scene: scene.process.kill(), ends=("left",)
    )
    for step in ("", *STEPS[:-1])
}
KILLED = tuple(name for name in FAULTS if name.startswith("killed "))
AT_EACH_STEP = {
    f"{name}, after {step}": replace(FAULTS[name], after=step, slow=False, ends=ANY, strict=False)
    for name in (
        "Docker restarted on the source",
        "Docker restarted on the target",
        "target gone",
        "source gone",
        "the manager cut off for a moment",
        "the source cut off for a moment",
        "the operator's connection to the source lost",
        "the operator's connection to the manager lost",
        "interrupted",
        "interrupted twice",
        "the label taken off the source by hand",
        "the label taken off the target by hand",
        "the label put on another host by hand",
        "the service updated by hand",
    )
    for step in STEPS[:-1]
}
"""What may come at any time. How it ends depends on the step; only that it ends well is asked."""


def go_wrong(project: Project, name: str, rng: random.Random) -> str:
    """A move in which something goes wrong, and then what its last words say; one line of how it ended.

    Afterwards the service is in one place, and nothing of the move is left.
    """
    fault, source = (FAULTS | AT_EACH_STEP)[name], place(project)
    target = other(source)
    fault.prepare(project, target)
    if fault.slow:
        path = volume(project, source, "mail_mail")
        project.sh(source, f"dd if=/dev/urandom of={path}/padding bs=1M count=3 2>/dev/null")
    limit = ["--bwlimit", "600"] if fault.slow else []
    process = project.start("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF, *limit)
    scene = Scene(project, source, target, process)
    assert process.stderr is not None
    said = ""
    if not fault.after:
        eventually(lambda: has_begun(project) or process.poll() is not None, 60, "it has begun")
    while fault.after and (line := process.stderr.readline()):
        said += line
        if f" s  {fault.after}: " in line:
            break
    time.sleep(rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, 1))))
    fault.do(scene)
    ran = project.finish(process, 300)
    fault.mend(scene)
    end = "left" if has_begun(project) else "moved" if place(project) == target else "undone"
    as_said = (end == "moved") == (ran.status == 0) or not (fault.strict or ran.status == 0)
    assert name in KILLED or (end in fault.ends and as_said), f"{name}: {end}: {said}{ran}"
    how = ""
    if end == "left":
        how = rng.choice(("the same", "resume", "abort"))
        finish(project, target, how)
    clean(project)
    assert project.fab("migrate.status", "--inventory", MAIL, check=0).stdout == "no move is under way\n"
    where = place(project)
    eventually(lambda: serves(project, where), 60, f"the MDA serves on {where}")
    return f"{end}{', then ' + how if how else ''}: on the {'target' if where == target else 'source'}"


def serves(project: Project, host: str) -> bool:
    found = container(project, host, "mail_mda")
    ask = "exec 3<>/dev/tcp/127.0.0.1/24 && read -r line <&3 && echo $line"
    return "220" in project.sh(host, f"docker exec {found or 'none'} bash -c '{ask}' 2>&1", check=False)


def finish(project: Project, target: str, how: str, service: str = "mda") -> None:
    """What somebody does who finds a move that was interrupted."""
    if how == "the same":
        end = migrate(project, target, service=service)
    elif how == "resume":
        end = project.fab("migrate.resume", "--inventory", MAIL, NO_PROOF, timeout=300)
    else:
        end = project.fab("migrate.abort", "--inventory", MAIL, timeout=300)
        if end.status:
            assert re.search("moving back is a move", end.errors[-1]), str(end)
            end = project.fab("migrate.resume", "--inventory", MAIL, NO_PROOF, timeout=300)
    assert end.status == 0, f"{how}: {end}"


# ---- a host that is lost ----


def is_down(project: Project, host: str) -> bool:
    """As the Swarm sees it; a manager that elects a leader with the others answers later."""
    try:
        [node] = [n for n in project.host("host1").docker.nodes() if n["Spec"]["Labels"]["swarmmail.host"] == host]
    except docker.errors.APIError:
        return False
    return bool(node["Status"]["State"] == "down")


@contextlib.contextmanager
def lost_host(project: Project, host: str) -> Iterator[None]:
    """For a while there is no such host, and the Swarm has seen it; afterwards the cluster is whole again."""
    project.stop(host)
    try:
        eventually(lambda: is_down(project, host), 120, "the Swarm sees it")
        yield
    finally:
        project.up(3)
    # a manager that comes back may cause an election
    eventually(lambda: project.bootstrap(MAIL, timeout=240).status == 0, 120, "the cluster is whole again")


# ---- the public address ----

HOOK = r"""#!/bin/bash
# It writes down what it is told, and what the service says to those who come to the new address by now.
case $1 in mta) port=25 ;; edge) port=143 ;; esac
exec 3<>"/dev/tcp/$5/$port" && read -r -t 10 line <&3
echo "$* ${line%% *}" >>"${0%/*}/told"
"""


def with_hook(project: Project, script: str = HOOK) -> None:
    """The inventory of these tests names a program that lets the public address follow."""
    folder = project.root / "address"
    folder.mkdir(exist_ok=True)
    (folder / "told").unlink(missing_ok=True)
    (folder / "hook").write_text(script)
    (folder / "hook").chmod(0o755)
    project.inventory(MAIL, stack={**STACK, "address_hook": "../address/hook"})


def told(project: Project) -> list[str]:
    path = project.root / "address" / "told"
    return path.read_text().splitlines() if path.exists() else []


def call(project: Project, role: str, source: str, target: str, said: str) -> str:
    return f"{role} {source} {target} {project.address(source)} {project.address(target)} {said}"
