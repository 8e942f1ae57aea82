"""How fast bootstrap and deploy are: swarmmail, Ansible and the floor, side by side on the same lab hosts.

    python -m tests.bench.bootstrap [--hosts 3] [--many 10] [--reps 3] [--cases first,second,...] [--csv FILE]

Run it in the folder of the checkout, in its virtual environment, on a machine that does nothing else: what else runs is
measured, too (each run's load is noted). Nothing here runs in CI: pytest collects no file of this folder.

Tools
    swarmmail    the command line as users type it, start of Python included
    ansible      ``peers/site.yml``, what a good practitioner runs today (community.docker), tuned by its ansible.cfg
    floor        ``peers/floor.sh``, the same Docker commands by multiplexed SSH, in parallel; nothing is checked
    ..., settled the floor also waits until all nodes hear each other by gossip, as swarmmail does: names resolve then
    ..., placed  the peer brings an image only to the host that runs it, as swarmmail does; otherwise to all hosts

Cases
    first        swarm, labels, overlay on new hosts: one manager, else workers, ``encryption: none``, as the peers do
    second       the same command again: nothing to do (the floor can't be run twice)
    many         first, with ``--many`` hosts
    stack        first, then images and stack, until both services run and are healthy; images are built beforehand
    layer        after stack: a configuration file of one image has changed (built beforehand), deploy again
    mesh         first, with WireGuard mesh and guard, which no peer has
    mesh-second  the same command again

What keeps it fair: the hosts are made anew before every first run of every tool (leaving a Swarm leaves agents behind),
get the Python modules that Ansible needs, and are left to become idle; tools take turns; SSH starts cold; what a run
left is checked on the hosts in the same way for all, and a run that does not pass counts as failed. All deploy the same
stack file and wait until its tasks run (for the Swarm, a task with a health check runs when it is healthy). Ours does
more in its time: it checks the hosts and the end state, marks and fences volumes, holds a lock, shows a plan.

Copying is measured by the lines that a tool prints as it begins and ends to copy images; ``docker save`` is part of it.
The floor makes the Swarm at the same time.

The exit status is 1 when a run failed. A goal that is missed is shown, and is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from swarmmail import lab, report
from swarmmail.cluster import images
from swarmmail.lab import files
from swarmmail.model import inventory as inventories
from swarmmail.model import stack as stacks
from swarmmail.model.errors import SwarmmailError

REPO = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
ANSIBLE = "ansible>=12,<13"
"""The package with the collections: community.docker is on PyPI only in it."""
MODULES = "python3-docker python3-requests python3-jsondiff python3-yaml"
"""What community.docker needs on the hosts (Debian packages)."""
NETWORK = "local-mail-delivery"
LIMIT = 600  # seconds for one run

SCENARIOS = (("first", "second"), ("many",), ("stack", "layer"), ("mesh", "mesh-second"))
"""Cases that follow each other on the same hosts."""
CASES = tuple(case for scenario in SCENARIOS for case in scenario)
TOOLS = ("swarmmail", "ansible", "ansible, placed", "floor", "floor, settled", "floor, placed")

Events = Sequence[tuple[float, str]]
"""What a tool printed, a line each, with the seconds since its start."""


# ---- the hosts ----


class Bench:
    """A project folder with a lab of its own, and the peers' files beside it."""

    def __init__(self, root: Path, modules: bool) -> None:
        self.root = root
        self.peers = root / "peers"
        self.ssh_config = root / "ssh_config"
        self.masters = root / "ssh"
        """Sockets of SSH masters, named by address."""
        self.modules = modules
        self._debs = b""
        self._throw_away: list[str] = []
        self.lab: lab.Lab | None = None

    def make(self) -> None:
        (self.root / "inventories").mkdir(parents=True)
        (self.root / "home").mkdir()
        self.masters.mkdir()
        shutil.copy(REPO / "fabfile.py", self.root)
        self.restore_stack()

    @property
    def names(self) -> list[str]:
        assert self.lab is not None
        return [machine.name for machine in self.lab.machines]

    def renew(self, hosts: int) -> None:
        """New hosts, idle. A failure to make them is the lab's: once more, then."""
        try:
            self._renew(hosts)
        except SwarmmailError as error:
            report.warning(f"{error}; once more")
            self._renew(hosts)

    def _renew(self, hosts: int) -> None:
        with _quietly():
            lab.down(self.root)
            self.lab = lab.up(self.root, hosts)
        self._write_ssh()
        with ThreadPoolExecutor(hosts) as pool:
            list(pool.map(lambda name: self.on(name, "systemctl is-system-running --wait"), self.names))
            if self.modules:
                if not self._debs:
                    self._debs = self._fetch(self.names[0])
                install = "d=$(mktemp -d) && tar -xf - -C $d && dpkg -i $d/*.deb && rm -r $d"
                list(pool.map(lambda name: self.on(name, install, self._debs), self.names))
        time.sleep(2)

    def _fetch(self, host: str) -> bytes:
        """The Debian packages of the modules, as a tar archive; fetched by a host, once."""
        self.on(host, f"apt-get update && apt-get install -y --no-install-recommends --download-only {MODULES}")
        packed = self.on(host, "cd /var/cache/apt/archives && tar -cf - *.deb && rm *.deb")
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            report.progress(f"modules for Ansible: {len(tar.getnames())} packages")
        return packed

    def on(self, host: str, script: str, stdin: bytes = b"") -> bytes:
        """Run a script on a host, by a connection of its own; what it wrote. Raises SwarmmailError."""
        assert self.lab is not None
        command = ["ssh", "-F", str(self.ssh_config), "-o", "ControlPath=none", self.lab.address(host), script]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=LIMIT, check=False)
        if done.returncode:
            raise SwarmmailError(done.stderr.decode(errors="replace").strip()[-800:], host=host, step=script[:60])
        return done.stdout

    # -- what the tools are given --

    def inventory(self, encryption: str) -> None:
        assert self.lab is not None
        content = {
            "cluster": "bench",
            "ssh": {"user": "root", "key": "../.lab/id_ed25519", "known_hosts": "../.lab/known_hosts"},
            "hosts": {
                machine.name: {"address": machine.address, "role": "worker" if number else "manager"}
                for number, machine in enumerate(self.lab.machines)
            },
            "network": {"name": NETWORK, "encryption": encryption},
            "stack": {
                "path": "../stacks/mail",
                "name": "mail",
                "settings": {"MAIL_DOMAIN": files.MAIL_DOMAIN, "MAIL_HOSTNAME": files.MAIL_HOSTNAMES[0]},
                "tls": {"certificate": "../.lab/tls.crt", "key": "../.lab/tls.key", "ca": "../.lab/ca.crt"},
                # a service a host, as far as there are hosts: a peer that places images has one archive for each host
                "placement": {"mta": self.names[0], "edge": self.names[1], "mda": self.names[-1]},
            },
        }
        path = self.root / "inventories" / "bench.yml"
        path.write_text(json.dumps(content, indent=2) + "\n")  # JSON is YAML

    def restore_stack(self) -> None:
        shutil.rmtree(self.root / "stacks", ignore_errors=True)
        shutil.copytree(REPO / "stacks", self.root / "stacks")

    def change_layer(self) -> None:
        """What an operator does most: a line of Postfix's configuration."""
        with (self.root / "stacks" / "mail" / "mta" / "main.cf").open("a") as out:
            out.write("# changed by the benchmark\n")

    def stack(self) -> stacks.StackFile:
        return stacks.read(inventories.load(self.root / "inventories" / "bench.yml"))

    def build(self, keep: bool = True) -> None:
        """Images are built before time is taken, for all tools. Those not to keep are removed by ``tidy``."""
        where = images.Builder(docker.from_env(timeout=LIMIT).api, "this machine")
        for service in self.stack().services.values():
            if service.build is not None and images.inspect(where.api, service.image) is None:
                images.build(where, service.build, service.image)
                if not keep:
                    self._throw_away.append(service.image)

    def tidy(self) -> None:
        """Leave nothing behind but images that the next deploy would build just so."""
        self.close_ssh()
        with _quietly():
            lab.down(self.root)
        for image in self._throw_away:
            with contextlib.suppress(docker.errors.DockerException):
                docker.from_env().images.remove(image)

    def write_peers(self, placed: bool, changed: Iterable[str] = ()) -> None:
        """The peers' files. ``placed``: an image goes only to the host that runs it. ``changed``: the services whose
        images have to be brought (none: all)."""
        assert self.lab is not None
        shutil.rmtree(self.peers, ignore_errors=True)
        self.peers.mkdir()
        inventory = inventories.load(self.root / "inventories" / "bench.yml")
        assert inventory.stack is not None
        stack = stacks.read(inventory)
        placement = inventory.stack.placement
        bring = {name: service.image for name, service in stack.services.items() if not changed or name in changed}
        archives: dict[str, list[str]] = {}
        if placed:
            archives = {str(self.peers / f"{name}.tar"): [image] for name, image in bring.items()}
        else:
            archives = {str(self.peers / "all.tar"): list(bring.values())}
        mine: dict[str, tuple[str, list[str]]] = {}
        for host in self.names:
            here = [
                path
                for path, held in archives.items()
                if not placed or any(placement[name] == host and bring[name] in held for name in bring)
            ]
            mine[host] = (here[0], archives[here[0]]) if here else ("", [])
        labels = {
            host: {"bench.host": host, **{name: "1" for name, where in placement.items() if where == host}}
            for host in self.names
        }
        wanted = [service.image for service in stack.services.values()]
        (self.peers / "stack.json").write_text(json.dumps(_plain(stack, inventory.stack.settings)))
        shutil.copy(self.lab.folder / "tls.crt", self.peers / "tls-certificate")
        shutil.copy(self.lab.folder / "tls.key", self.peers / "tls-key")
        # for the floor
        (self.peers / "settings").write_text(
            f"ssh_config={self.ssh_config}\nnetwork={NETWORK}\nstack=mail\nimages='{' '.join(wanted)}'\n"
        )
        (self.peers / "archives").write_text("".join(f"{p} {' '.join(held)}\n" for p, held in archives.items()))
        (self.peers / "hosts").write_text(
            "".join(
                f"{machine.name} {machine.address} {'worker' if number else 'manager'} {mine[machine.name][0] or '-'} "
                f"{' '.join(f'{key}={value}' for key, value in labels[machine.name].items())}\n"
                for number, machine in enumerate(self.lab.machines)
            )
        )
        # for Ansible
        content = {
            "all": {
                "vars": {
                    "folder": str(self.peers),
                    "network": NETWORK,
                    "stack_name": "mail",
                    "wait": wanted,
                    "archives": [{"file": path, "images": held} for path, held in archives.items()],
                },
                "children": {
                    "swarm": {
                        "hosts": {
                            machine.name: {
                                "ansible_host": machine.address,
                                "ansible_user": "root",
                                "swarm_labels": labels[machine.name],
                                "image_archive": mine[machine.name][0],
                                "image_names": mine[machine.name][1],
                            }
                            for machine in self.lab.machines
                        }
                    },
                    "managers": {"hosts": {self.names[0]: {}}},
                },
            }
        }
        (self.peers / "hosts.yml").write_text(json.dumps(content, indent=1))

    def _write_ssh(self) -> None:
        assert self.lab is not None
        self.ssh_config.write_text(
            f"Host *\n  User root\n  IdentityFile {self.lab.key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.lab.known_hosts}\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n"
            f"  GSSAPIAuthentication no\n  ControlMaster auto\n  ControlPersist 60\n  ControlPath {self.masters}/%h\n"
        )

    def close_ssh(self) -> None:
        """End the peers' SSH masters: each run starts cold."""
        for socket in self.masters.iterdir():
            subprocess.run(
                ["ssh", "-F", str(self.ssh_config), "-O", "exit", socket.name],
                capture_output=True,
                timeout=10,
                check=False,
            )

    def check(self, stack: bool) -> str:
        """What is wrong after a run, seen on the first manager; empty when nothing is."""
        lead = self.names[0]
        try:
            states = self.on(
                lead, "docker node ls -q | xargs docker node inspect -f '{{.Status.State}} {{len .Spec.Labels}}'"
            )
            ready = [line for line in states.decode().splitlines() if re.fullmatch("ready [1-9]", line)]
            if len(ready) != len(self.names):
                return f"{len(ready)} of {len(self.names)} nodes are ready and have labels"
            self.on(lead, f"docker network inspect {NETWORK}")
            if stack:
                tasks = self.on(
                    lead,
                    "docker stack ps mail --no-trunc --filter desired-state=running "
                    "--format '{{.Image}} {{.CurrentState}}'",
                ).decode()
                for service in self.stack().services.values():
                    if not re.search(f"^{re.escape(service.image)} Running", tasks, re.MULTILINE):
                        return f"{service.image} does not run: {tasks.strip()}"
        except SwarmmailError as error:
            return str(error)
        return ""


def _plain(stack: stacks.StackFile, settings: Mapping[str, str]) -> dict[str, Any]:
    """The stack file as a peer deploys it: the same images and settings, a placement, nothing of ours."""
    text = json.dumps(stack.document.value, default=str)
    text = re.sub(r"\$\{(\w+)(?::[-?][^}]*)?\}", lambda found: settings.get(found[1], ""), text)
    value: dict[str, Any] = json.loads(text)
    for name, service in value["services"].items():
        service.pop("build", None)
        service["image"] = stack.services[name].image
        service["deploy"]["placement"] = {"constraints": [f"node.labels.{name} == 1"]}
    return value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    report.quiet()
    try:
        yield
    finally:
        report.quiet(False)


# ---- the tools ----


@dataclass(frozen=True)
class Tool:
    """One of those compared."""

    name: str
    command: Callable[[str], list[str] | None]
    """Case to command line; None: it cannot do that."""
    copying: Callable[[Events], float | None]
    """Seconds of a run in which images were copied."""
    environment: Mapping[str, str] = field(default_factory=dict)
    placed: bool = False
    """Whether images go only to the hosts that run them."""


def swarmmail() -> Tool:
    beside = Path(sys.executable).with_name("fab")
    fab = [str(beside)] if beside.exists() else [sys.executable, "-m", "fabric"]
    words = {"stack": ["bootstrap", "deploy", "--no-probe"], "layer": ["deploy", "--no-probe"]}
    return Tool(
        "swarmmail",
        lambda case: [*fab, *words.get(case, ["bootstrap"])],
        _copying_of_ours,
        {"PYTHONPATH": str(REPO), "SWARMMAIL_INVENTORY": "bench"},
    )


def _copying_of_ours(events: Events) -> float | None:
    """From what was said before the first image to the last image's end."""
    said = [number for number, (_, text) in enumerate(events) if _about(text) == "image"]
    return events[said[-1]][0] - (events[said[0] - 1][0] if said[0] else 0) if said else None


def ansible(bench: Bench, venv: Path, placed: bool) -> Tool:
    def command(case: str) -> list[str] | None:
        if case.startswith("mesh") or (placed and case not in ("stack", "layer")):
            return None
        stack = case in ("stack", "layer")
        steps = json.dumps({"images": stack, "stack": stack})
        playbook = str(venv / "bin" / "ansible-playbook")
        return [playbook, "-i", str(bench.peers / "hosts.yml"), "-e", steps, str(PEERS / "site.yml")]

    return Tool(
        "ansible, placed" if placed else "ansible",
        command,
        _copying_of_ansible,
        {
            "ANSIBLE_CONFIG": str(PEERS / "ansible.cfg"),
            "ANSIBLE_HOME": str(bench.root / "home" / "ansible"),
            "ANSIBLE_SSH_ARGS": f"-F {bench.ssh_config} -o ControlMaster=auto -o ControlPersist=60",
            "ANSIBLE_SSH_CONTROL_PATH": f"{bench.masters}/%%h",
            "LC_ALL": "C.UTF-8",  # Ansible refuses to run in a locale without UTF-8
        },
        placed,
    )


def _copying_of_ansible(events: Events) -> float | None:
    """From each heading of a task that handles archives to the next heading."""
    headings = [(at, text) for at, text in events if text.startswith(("TASK [", "PLAY "))]
    spans = [
        after - at for (at, text), (after, _) in itertools.pairwise(headings) if text.startswith("TASK [image archive")
    ]
    return sum(spans) if spans else None


def floor(bench: Bench, kind: str = "") -> Tool:
    """``kind``: empty, settled or placed."""
    whole = ["swarm", "images", "secrets", "stack"]
    steps = {
        "": {"first": ["swarm"], "many": ["swarm"], "stack": whole, "layer": ["images", "stack"]},
        "settled": {"first": ["swarm", "settle"], "many": ["swarm", "settle"]},
        "placed": {"stack": whole, "layer": ["images", "stack"]},
    }[kind]

    def command(case: str) -> list[str] | None:
        return [str(PEERS / "floor.sh"), str(bench.peers), *steps[case]] if case in steps else None

    name = f"floor, {kind}" if kind else "floor"
    return Tool(name, command, _copying_of_the_floor, placed=kind == "placed")


def _copying_of_the_floor(events: Events) -> float | None:
    at = {text: when for when, text in events}
    return at["copy ends"] - at["copy begins"] if {"copy begins", "copy ends"} <= at.keys() else None


def install_ansible(cache: Path) -> Path:
    """The virtual environment with Ansible. Raises SwarmmailError."""
    venv = cache / "ansible-venv"
    if not (venv / "bin" / "ansible-playbook").exists():
        report.progress(f"installing Ansible in {venv}: half a gigabyte, a minute or more")
        for command in (
            [sys.executable, "-m", "venv", str(venv)],
            [str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", ANSIBLE],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
            if done.returncode:
                raise SwarmmailError(
                    (done.stderr.strip().splitlines() or ["no message"])[-1],
                    step="install Ansible",
                    hint="run with --without-ansible",
                )
    return venv


# ---- a run ----


@dataclass(frozen=True)
class Run:
    """A run as it was."""

    case: str
    tool: str
    hosts: int
    rep: int
    seconds: float
    copying: float | None
    load: float
    problem: str
    events: Events


def run(bench: Bench, tool: Tool, case: str, rep: int) -> Run:
    """Take the time of one command, then check what it left."""
    command = tool.command(case)
    assert command is not None
    bench.close_ssh()
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "DOCKER_HOST", "TMPDIR")}
    load = os.getloadavg()[0]
    events: list[tuple[float, str]] = []
    began = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=bench.root,
        env={**kept, "HOME": str(bench.root / "home"), **tool.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        stream = process.stdout
        assert stream is not None

        def read() -> None:
            for line in stream:
                events.append((time.monotonic() - began, line.rstrip()))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        problem = ""
        try:
            status = process.wait(LIMIT)
            seconds = time.monotonic() - began
            problem = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            seconds, problem = float(LIMIT), f"took longer than {LIMIT} s"
            os.killpg(process.pid, signal.SIGKILL)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            bench.close_ssh()  # a master may hold the pipe open
            reader.join(5)
    problem = problem or bench.check(stack=case in ("stack", "layer"))
    copying = tool.copying(events) if case in ("stack", "layer") else None
    result = Run(case, tool.name, len(bench.names), rep, seconds, copying, load, problem, tuple(events))
    ended = f"FAILED: {problem}" if problem else f"{seconds:.2f} s"
    report.progress(f"{case}, {len(bench.names)} hosts, {tool.name}, run {rep}: {ended} (load {load:.1f})")
    if problem:
        for at, line in events[-15:]:
            report.progress(f"  {at:6.2f} s | {line}")
    return result


def scenario(bench: Bench, tool: Tool, cases: Sequence[str], wanted: set[str], hosts: int, rep: int) -> list[Run]:
    """The cases, one after the other on new hosts, as far as they are wanted; a first one that is not is only done."""
    cases = [case for case in cases if tool.command(case) is not None]
    while cases and cases[-1] not in wanted:
        cases.pop()
    if not cases:
        return []
    done = []
    bench.restore_stack()
    bench.renew(hosts)
    bench.inventory("wireguard" if cases[0].startswith("mesh") else "none")
    bench.build()
    bench.write_peers(tool.placed)
    for case in cases:
        if case == "layer":
            bench.change_layer()
            bench.build(keep=False)
            bench.write_peers(tool.placed, ["mta"])
            time.sleep(2)
        done.append(run(bench, tool, case, rep))
        if done[-1].problem:
            break
    return [result for result in done if result.case in wanted]


# ---- what comes of it ----


@dataclass(frozen=True)
class Goal:
    """What swarmmail is held to, in a case, beside a tool (itself: an absolute goal)."""

    text: str
    met: Callable[[Summary, Summary], bool]
    """Of swarmmail's numbers and the tool's."""


@dataclass(frozen=True)
class Summary:
    """The good runs of a tool in a case: seconds."""

    times: tuple[float, ...]
    copying: tuple[float, ...]
    failed: int

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def copy(self) -> float:
        return statistics.median(self.copying)


def _copies(ours: Summary, theirs: Summary, most: float) -> bool:
    return bool(ours.copying and theirs.copying) and ours.copy <= most * theirs.copy


GOALS: dict[tuple[str, str], Goal] = {
    ("first", "floor"): Goal("at most 1.5 times the floor", lambda ours, it: ours.median <= 1.5 * it.median),
    ("first", "ansible"): Goal("3 times faster", lambda ours, it: it.median >= 3 * ours.median),
    ("second", "swarmmail"): Goal("under 1 s", lambda ours, it: ours.median < 1),
    ("second", "ansible"): Goal("6 times faster", lambda ours, it: it.median >= 6 * ours.median),
    ("many", "floor"): Goal("at most 1.5 times the floor", lambda ours, it: ours.median <= 1.5 * it.median),
    ("stack", "floor"): Goal("copying at most 0.8 of the floor's", lambda ours, it: _copies(ours, it, 0.8)),
    ("layer", "swarmmail"): Goal("copying under 1 s", lambda ours, it: bool(ours.copying) and ours.copy < 1),
}


def summarize(runs: Iterable[Run]) -> dict[tuple[str, str], Summary]:
    grouped: dict[tuple[str, str], list[Run]] = {}
    for result in runs:
        grouped.setdefault((result.case, result.tool), []).append(result)
    return {
        key: Summary(
            tuple(result.seconds for result in group if not result.problem),
            tuple(result.copying for result in group if not result.problem and result.copying is not None),
            sum(bool(result.problem) for result in group),
        )
        for key, group in grouped.items()
    }


def _spread(values: Sequence[float]) -> tuple[str, str]:
    """Median and range, in seconds."""
    if not values:
        return "", ""
    return f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"


def _compared(ours: Summary, theirs: Summary) -> str:
    if ours.median <= theirs.median:
        return f"{theirs.median / ours.median:.1f} times faster"
    return f"{ours.median / theirs.median:.2f} times as long"


def show(runs: Sequence[Run], titles: Mapping[str, str]) -> None:
    found = summarize(runs)
    rows = []
    for case in CASES:
        ours = found.get((case, "swarmmail"))
        for tool in (tool for tool in TOOLS if (case, tool) in found):
            summary = found[case, tool]
            comparable = bool(ours and ours.times and summary.times)
            goal, verdict = GOALS.get((case, tool)), ""
            if goal is not None and ours is not None and comparable:
                verdict = f"{goal.text}: {'met' if goal.met(ours, summary) else 'MISSED'}"
            rows.append(
                (
                    titles[case],
                    tool,
                    f"{len(summary.times)}" + (f", {summary.failed} FAILED" if summary.failed else ""),
                    *_spread(summary.times),
                    _spread(summary.copying)[0],
                    _compared(ours, summary) if ours and comparable and tool != "swarmmail" else "",
                    verdict,
                )
            )
    columns = ["case", "tool", "runs", "median s", "range s", "copying s", "swarmmail is", "goal for swarmmail"]
    report.table("swarmmail beside its peers", columns, rows)


_PROGRESS = re.compile(r"^ *\d+\.\d s  (?:(?:host\d+|this machine): )?(?P<about>[^:(\d]*)")
_RESULT = re.compile(r"^(?P<about>bootstrap|deploy): |^(?P<plan>\+) \S")


def _about(line: str) -> str:
    """What a line is about that shows how far swarmmail has come; empty for any other line.

    Lines of progress (`  1.2 s  host1: image: 3 MB` is about `image`), the result of a task, a line of a deploy's plan.
    """
    if progress := _PROGRESS.match(line):
        return progress["about"].strip()
    if result := _RESULT.match(line):
        return f"result of {result['about']}" if result["about"] else "plan of deploy"
    return ""


def phases(events: Events, seconds: float) -> dict[str, float]:
    """Seconds between the lines that show how far it came, by what the earlier one is about; the same kind is summed.

    A line about an image comes at the end of its copy, so time before such a line is for images.
    """
    spans: dict[str, float] = {}
    at, name = 0.0, "start, connect, observe"
    for when, about in [*((when, about) for when, text in events if (about := _about(text))), (seconds, "")]:
        name = "docker save, copy, load" if about == "image" else name
        spans[name] = spans.get(name, 0.0) + when - at
        at, name = when, "after the images" if about == "image" else f"after: {about}"
    return spans


def show_phases(runs: Sequence[Run], titles: Mapping[str, str], started: float) -> None:
    report.result("")
    report.result(f"Where swarmmail's time goes (of it, Python and imports, as of `fab --list`: {started:.2f} s)")
    for case in CASES:
        mine = [result for result in runs if (result.case, result.tool) == (case, "swarmmail") and not result.problem]
        if not mine:
            continue
        all_spans = [phases(result.events, result.seconds) for result in mine]
        names = dict.fromkeys(name for spans in all_spans for name in spans)
        rows = [(name, f"{statistics.median(spans.get(name, 0.0) for spans in all_spans):.2f}") for name in names]
        report.table(titles[case], ["phase, by lines of progress", "median s"], rows)


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["case", "tool", "hosts", "rep", "seconds", "copying", "load", "problem"])
        for r in runs:
            copying = "" if r.copying is None else f"{r.copying:.3f}"
            writer.writerow([r.case, r.tool, r.hosts, r.rep, f"{r.seconds:.3f}", copying, f"{r.load:.2f}", r.problem])


# ---- the command ----


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "swarmmail-bench"
    parser.add_argument("--hosts", type=int, default=3, help="hosts in all cases but `many` (default 3)")
    parser.add_argument("--many", type=int, default=10, help="hosts in the case `many` (default 10)")
    parser.add_argument("--reps", type=int, default=3, help="runs of each tool in each case (default 3)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"which, with commas (default {','.join(CASES)})")
    parser.add_argument("--csv", type=Path, help="write every run to this file")
    parser.add_argument(
        "--cache", type=Path, default=default_cache, help=f"where Ansible is kept (default {default_cache})"
    )
    parser.add_argument("--without-ansible", action="store_true", help="for where it can't be installed")
    given = parser.parse_args(words)
    given.cases = set(given.cases.split(","))
    if unknown := given.cases - set(CASES):
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if min(given.hosts, given.many) < 2 or given.reps < 1:
        parser.error("at least two hosts and one run")
    return given


def _start_of_python(bench: Bench, tool: Tool) -> float:
    """Seconds of `fab --list`, the shortest of three; so what is compiled at the first start is compiled."""
    command = tool.command("first")
    assert command is not None
    times = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run(
            [*command[:-1], "--list"],
            cwd=bench.root,
            env={**os.environ, **tool.environment},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        times.append(time.monotonic() - began)
    return min(times)


def measure(given: argparse.Namespace, root: Path) -> int:
    bench = Bench(root, modules=not given.without_ansible)
    bench.make()
    ours = swarmmail()
    peers = [floor(bench), floor(bench, "settled"), floor(bench, "placed")]
    if not given.without_ansible:
        venv = install_ansible(given.cache.resolve())
        peers = [ansible(bench, venv, placed=False), ansible(bench, venv, placed=True), *peers]
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    report.progress(f"{cores} cores, load {load:.1f}")
    if load > cores / 4:
        report.warning(f"this machine is busy (load {load:.1f}): the numbers will be about that, too")
    few, many = f"{given.hosts} hosts", f"{given.many} hosts"
    titles = {
        "first": f"{few}, first bootstrap",
        "second": f"{few}, second bootstrap",
        "many": f"{many}, first bootstrap",
        "stack": f"{few}, bootstrap, images, stack",
        "layer": f"{few}, a file of one image changed",
        "mesh": f"{few}, first bootstrap, WireGuard and guard",
        "mesh-second": f"{few}, second bootstrap, WireGuard and guard",
    }
    runs: list[Run] = []
    started = _start_of_python(bench, ours)
    stopped = ""
    try:
        for rep in range(1, given.reps + 1):
            for cases in SCENARIOS:
                hosts = given.many if cases == ("many",) else given.hosts
                turns = (ours, *peers)
                for tool in turns[rep % len(turns) :] + turns[: rep % len(turns)]:
                    runs += scenario(bench, tool, cases, given.cases, hosts, rep)
    except (SwarmmailError, subprocess.SubprocessError) as error:
        stopped = str(error)
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        bench.tidy()
        if given.csv:
            write_csv(given.csv, runs)
    show(runs, titles)
    show_phases(runs, titles, started)
    if stopped:
        report.error(f"stopped early: {stopped}")
    return int(bool(stopped) or any(result.problem for result in runs))


def main(words: Sequence[str] | None = None) -> int:
    given = _arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="swarmmail-bench-") as folder:
        try:
            return measure(given, Path(folder).resolve())
        except SwarmmailError as error:
            report.error(str(error))
            return 1


if __name__ == "__main__":
    sys.exit(main())
