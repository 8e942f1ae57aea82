"""What the lab tests share: real hosts, the real command line.

Fixtures
    ``project``   a folder with what a checkout has, and a lab of its own: a ``Project``. One for the whole session.
    ``lab``       the same project with three hosts up (``host1`` .. ``host3``), in whatever state tests left them.
    ``fresh``     ``lab`` with the hosts clean: Docker runs, its images are kept, and there is no swarm, mesh, lock,
                  container, volume or network. About 1.3 s, and nothing when they are clean already.
    ``clustered`` ``lab`` after a ``fab bootstrap`` of ``CLUSTER``.
    ``deployed``  ``lab`` after a ``fab bootstrap deploy`` of ``MAIL``, the same hosts with the mail stack. Both look
                  first whether a test has touched what they would look at (0.1 s instead of 1.2).
    ``mailing``   ``deployed`` with the accounts of the tests of moves.
    ``empty``     ``clustered``, with an inventory ``MAIL`` and nothing of its stack.
    ``back_to_the_beginning``  for a file whose tests move services: the hosts are clean after it.
    ``fab``       ``project.fab``.
    ``make_project``  for a test that needs other hosts: ``make_project("name")`` is a project whose lab is removed
                  at the end of the test; ``with temporary(place, "name") as project`` is the same for a fixture of
                  another scope. A host costs 50 MiB, and a stock kernel allows 14 on a machine (inotify): be sparing.

Project
    ``fab(*words, env=, check=, timeout=, stdin=)`` runs the command line in the folder, without a terminal: a
    ``Result``.
    ``check=0`` (any status) fails the test unless the command ends with it. ``start`` does not wait for it.
    ``inventory(name, hosts=, **changes)`` writes ``inventories/NAME.yml`` and returns NAME, for ``--inventory``.
    ``sh(host, script)`` runs a script on a host past SSH (for breaking things, and when SSH is broken).
    ``on(host, *words)`` is the command, here, that runs a program there.
    ``host(name)`` is a ``swarmmail.hosts.connection.Host``: SSH and Docker API, for looking.
    ``image(host)`` gives a host a tiny image (``sleep``, ``echo``), without any registry; its name.
    ``up(hosts, bare)``, ``stop(host)``, ``reboot(host)``, ``reset(*hosts)``, ``address(host)``, ``bridge``.

``SWARMMAIL_LAB=vm`` gives these fixtures virtual hosts: the same tests, with kernels of their own (and a lot of
patience, since those may be emulated). ``SWARMMAIL_ENCRYPTION=wireguard``: by their kernels' WireGuard; else ipsec is
chosen there, where the leaks of ``test_verify.py`` do not exist.

Tests never touch a lab of the checkout itself. A killed session leaves its lab behind; the next one removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import getpass
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
from known import Known

from swarmmail import lab as labs
from swarmmail.cluster import images
from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.lab import image, vmimage
from swarmmail.lab.driver import Driver
from swarmmail.lab.naming import Naming
from swarmmail.model import inventory as model
from swarmmail.model import stack as stacks
from swarmmail.model.errors import SwarmmailError

REPO = Path(__file__).resolve().parents[2]
# A job in the background of a shell's script ignores Ctrl-C, and what it starts would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

HOSTS = ("host1", "host2", "host3")
DRIVER = os.environ.get("SWARMMAIL_LAB", "")
"""What the fixtures' hosts are: containers, or ``vm``."""
ENCRYPTION = os.environ.get("SWARMMAIL_ENCRYPTION", "auto")
SLOW = 10 if DRIVER == "vm" else 1
"""How many times as long to wait for a command before it counts as hanging."""
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # each with a lab, on one machine
PATIENCE = 4 if DRIVER == "vm" else 1 if _WORKERS == 1 else 2
"""``SWARMMAIL_PATIENCE`` of the commands: how many times as long their own deadlines are."""
CLUSTER = "cluster"
"""Name of the inventory that ``clustered`` uses: three managers, no stack."""
MAIL = "mail"
"""Name of the inventory that ``deployed`` uses."""
STACK: Mapping[str, Any] = {
    "path": "../stacks/mail",
    "name": "mail",
    "settings": {"MAIL_DOMAIN": "lab.test", "MAIL_HOSTNAME": "mx.lab.test"},
    "tls": {"certificate": "../.lab/tls.crt", "key": "../.lab/tls.key", "ca": "../.lab/ca.crt"},
    "placement": {"mta": "host1", "mda": "host3"},
}
"""Section ``stack`` of that inventory."""

# Docker is killed and its state taken away, because `swarm leave` of the last of three managers waits 5 s for
# the others, and what a test broke might keep it from working at all. Images stay: they are what takes time.
_RESET = """
PATH=$PATH:/usr/sbin:/sbin
clean() {
  [ "$(systemctl is-system-running)" = running ] &&
  [ ! -e /etc/swarmmail ] && [ ! -e /etc/wireguard/swarmmail.conf ] && [ ! -e /etc/wireguard/swarmmail.key ] &&
  [ ! -e /run/swarmmail-lock ] && [ ! -e /etc/systemd/system/docker.service.d ] &&
  [ "$(docker info -f '{{.Swarm.LocalNodeState}} {{.Containers}}' 2>/dev/null)" = 'inactive 0' ] &&
  [ -z "$(docker volume ls -q)" ] && [ "$(docker network ls -q | wc -l)" = 3 ]
}
clean && exit 0
systemctl kill -s KILL docker.service 2>/dev/null
systemctl stop docker.service docker.socket wg-quick@swarmmail swarmmail-guard 2>/dev/null
for task in $(ctr -n moby tasks list -q 2>/dev/null); do
  ctr -n moby tasks rm -f $task; ctr -n moby containers rm $task
done >/dev/null 2>&1
systemctl -q disable wg-quick@swarmmail swarmmail-guard 2>/dev/null
for link in swarmmail docker_gwbridge; do ip link del $link 2>/dev/null; done
ip -4 route flush type blackhole 2>/dev/null
nft flush ruleset
rm -rf /etc/swarmmail /etc/wireguard/swarmmail.* /etc/systemd/system/swarmmail-guard.service \
  /etc/systemd/system/docker.service.d /run/swarmmail*
for mount in $(awk '$2 ~ "^/var/lib/docker/." {print $2}' /proc/mounts | sort -r); do umount -l $mount; done
# Docker puts the link of an overlay back into the host when it gives the overlay up. Killed then, it leaves the link,
# and what would use that overlay's number later gets "error creating vxlan interface: file exists".
for link in $(ls /sys/class/net | grep ^vx-); do ip link del $link; done
for space in /run/docker/netns/*; do umount -l $space; rm -f $space; done 2>/dev/null
cd /var/lib/docker && rm -rf swarm network containers volumes
systemctl daemon-reload; systemctl reset-failed
systemctl start docker.socket docker.service
clean || { echo 'not clean:'; systemctl --failed --no-legend; docker info 2>&1; docker network ls; exit 1; }
"""


@dataclass(frozen=True)
class Result:
    """What a command left."""

    words: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def events(self) -> list[str]:
        """Progress lines, without their time."""
        return [_PROGRESS.sub("", line) for line in self.stderr.splitlines() if _PROGRESS.match(line)]

    @property
    def errors(self) -> list[str]:
        """What is on standard error and is no progress."""
        return [line for line in self.stderr.splitlines() if line.strip() and not _PROGRESS.match(line)]

    def error(self, *parts: str) -> str:
        """Assert that the command failed with exactly one line, with these parts (patterns) in this order,
        and with a hint; the line."""
        assert self.status != 0, str(self)
        assert "Traceback" not in self.output and "this should not happen" not in self.output, str(self)
        assert len(self.errors) == 1, str(self)
        line = self.errors[0]
        assert re.search(".*".join(parts), line), f"{parts} not in: {line}"
        assert " -> " in line, f"no hint in: {line}"
        return line

    def __str__(self) -> str:
        return (
            f"fab {' '.join(self.words)}: status {self.status} after {self.seconds:.1f} s\n"
            f"--- standard output\n{self.stdout}\n--- standard error\n{self.stderr}"
        )

    __repr__ = __str__


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HELD_BACK = "-sys_time,-sys_module,-sys_rawio"  # what a mistake could break on this machine: see lab/rights.py
_PROGRESS = re.compile(r"^ *\d+\.\d s  ")


class Project:
    """A folder like a checkout, with a lab of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fleet: Fleet | None = None
        self._looking = threading.Lock()
        self._inits: dict[str, tuple[int, str]] = {}
        self.known = Known(self, HOSTS)

    def make(self) -> None:
        """The files of a checkout. The code is not copied: PYTHONPATH leads to it."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "inventories").mkdir()
        (self.root / "home").mkdir()
        shutil.copy(REPO / "fabfile.py", self.root)
        shutil.copytree(REPO / "stacks", self.root / "stacks")
        manual = REPO / "inventories" / "example.yml"
        if manual.exists():
            shutil.copy(manual, self.root / "inventories")

    def ask_seldom(self) -> None:
        """Health is asked seldom and patiently: each time Docker starts a process in the container, which takes an
        emulated host a second of its processor, and the services would be ended for the time that their checks take."""
        stack = self.root / "stacks" / "mail" / "stack.yml"
        text = stack.read_text()
        for old, new in (
            (" interval: 30s", " interval: 300s"),
            ("start_interval: 500ms", "start_interval: 5s"),
            ("start_period: 60s", "start_period: 600s"),
            ("timeout: 10s", "timeout: 120s"),
        ):
            assert old in text, text
            text = text.replace(old, new)
        stack.write_text(text)

    def remove(self) -> None:
        self.disconnect()
        if self.root.exists():
            labs.down(self.root)
            shutil.rmtree(self.root)

    # -- the command line --

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The tester's own settings must not matter: a home of its own, no inventory chosen. The cache is shared: the
        disk of virtual hosts takes a minute to make."""
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "DOCKER_HOST", "TMPDIR")}
        own = {"HOME": str(self.root / "home"), "XDG_CACHE_HOME": str(vmimage.cache(os.environ).parents[1])}
        return {**kept, **own, "SWARMMAIL_PATIENCE": str(PATIENCE), "PYTHONPATH": str(REPO), **(env or {})}

    def start(self, *words: str, env: Mapping[str, str] | None = None, stdin: str = "") -> subprocess.Popen[str]:
        with tempfile.TemporaryFile("w+") as given:
            given.write(stdin)
            given.seek(0)
            return subprocess.Popen(
                [sys.executable, "-m", "fabric", *words],
                cwd=self.root,
                env=self.environment(env),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def finish(self, process: subprocess.Popen[str], timeout: float = 120) -> Result:
        """Wait for what ``start`` began; after ``timeout`` seconds it is killed, and the test fails."""
        began = time.monotonic()
        words = tuple(str(word) for word in process.args[3:])  # type: ignore[index]
        try:
            out, err = process.communicate(timeout=SLOW * timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"took longer than {timeout:g} s: {Result(words, -1, out, err, timeout)}")
        return Result(words, process.returncode, out, err, time.monotonic() - began)

    def fab(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        check: int | None = None,
        timeout: float = 120,
        stdin: str = "",
    ) -> Result:
        result = self.finish(self.start(*words, env=env, stdin=stdin), timeout)
        if check is not None:
            assert result.status == check, str(result)
        return result

    def bootstrap(self, inventory: str, *words: str, **options: Any) -> Result:
        return self.fab("bootstrap", "--inventory", inventory, *words, **options)

    def inventory(
        self,
        name: str,
        hosts: Sequence[str] | Mapping[str, Mapping[str, Any]] = HOSTS,
        managers: int = 3,
        **changes: Any,
    ) -> str:
        """Write an inventory without a stack; ``changes`` are merged into its sections.

        ``hosts``: names, of which the first ``managers`` become managers; or a mapping from name to what differs.
        """
        driver = self.driver
        known = {machine.name: machine.address for machine in driver.machines()}
        slow = {"connect_timeout": 60} if driver.kind == "vm" else {}
        differing = hosts if isinstance(hosts, Mapping) else {host: {} for host in hosts}
        content: dict[str, Any] = {
            "cluster": "test",
            "ssh": {"user": "root", "key": "../.lab/id_ed25519", "known_hosts": "../.lab/known_hosts", **slow},
            "hosts": {
                host: {"address": known.get(host), "role": "manager" if i < managers else "worker", **different}
                for i, (host, different) in enumerate(differing.items())
            },
        }
        if ENCRYPTION != "auto":
            content["network"] = {"encryption": ENCRYPTION}
        for section, change in changes.items():
            content[section] = {**content.get(section, {}), **change} if isinstance(change, Mapping) else change
        # JSON is YAML
        (self.root / "inventories" / f"{name}.yml").write_text(json.dumps(content, indent=2) + "\n")
        return name

    # -- the hosts --

    @property
    def machines(self) -> list[labs.Machine]:
        return self.driver.machines()

    @property
    def driver(self) -> Driver:
        return labs.driver_of(self.root)

    def up(self, hosts: int = 3, bare: int = 0, driver: str = "") -> labs.Lab:
        """Make missing hosts, start stopped ones."""
        return labs.up(self.root, hosts, bare, driver=driver)

    def address(self, host: str) -> str:
        return next(machine.address for machine in self.machines if machine.name == host)

    @property
    def gateway(self) -> str:
        """Address of this machine on the lab's network: to the hosts, a stranger's."""
        return self.machines[0].address.rsplit(".", 1)[0] + ".1"

    @property
    def bridge(self) -> str:
        return Naming.of(self.root).bridge

    def container(self, host: str) -> str:
        return Naming.of(self.root).container(host)

    def _docker(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=60, check=False)

    def on(self, host: str, *words: str) -> list[str]:
        if self.driver.kind == "vm":
            lab = self.root / ".lab"
            keys = ("-i", f"{lab}/id_ed25519", "-o", f"UserKnownHostsFile={lab}/known_hosts", "-o", "BatchMode=yes")
            return ["ssh", "-F", "/dev/null", *keys, f"root@{self.address(host)}", shlex.join(words)]
        process = self.init(host) if os.geteuid() == 0 else 0
        if not process:  # Docker says why
            return ["docker", "exec", "-i", self.container(host), *words]
        # Docker takes 70 ms of a processor to start a program in a container, and tests start thousands.
        enter = ("nsenter", "-at", str(process), "setpriv", f"--bounding-set={_HELD_BACK}")
        return [*enter, "env", "-i", "HOME=/root", f"PATH={_PATH}", *words]

    def init(self, host: str) -> int:
        """Process id of a container's first process; 0 where it does not run."""
        process, since = self._inits.get(host, (0, ""))
        if not process or _started(process) != since:
            said = self._docker("inspect", "-f", "{{.State.Pid}}", self.container(host)).stdout.strip()
            process = int(said) if said.isdigit() else 0
            self._inits[host] = process, _started(process)
        return process

    def sh(self, host: str, script: str, *, check: bool = True, timeout: float = 60) -> str:
        """Run a script as root on a host, past SSH (a virtual one: by SSH); what it wrote on both streams."""
        if self.driver.kind == "vm":
            ran = self.host(host).run("sh -s", stdin=script + "\n", timeout=10 * timeout, check=False)
            assert ran.ok or not check, f"{host}: {script}\n{ran.stdout}{ran.stderr}"
            return ran.stdout + ran.stderr
        words = self.on(host, "sh", "-s")
        done = subprocess.run(words, input=script + "\n", capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0 or not check, f"{host}: {script}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def stop(self, host: str) -> None:
        """Pull the plug."""
        self.driver.power_off(host)
        self.disconnect()

    def reboot(self, host: str) -> None:
        """Clean shutdown and start, until SSH and Docker answer."""
        assert self._docker("restart", "-t", "20", self.container(host)).returncode == 0
        self.disconnect()
        machines = self.machines
        self.up(sum(m.variant == "host" for m in machines), sum(m.variant == "bare" for m in machines))

    def reset(self, *hosts: str) -> None:
        """Make the hosts clean again (see ``fresh``); all, when none is named. Stopped ones are started."""
        machines = self.machines
        if any(machine.state != "running" for machine in machines):
            self.up(sum(m.variant == "host" for m in machines), sum(m.variant == "bare" for m in machines))
        chosen = hosts or tuple(machine.name for machine in machines if machine.variant == "host")
        self.disconnect()
        with ThreadPoolExecutor(len(chosen)) as pool:
            list(pool.map(lambda host: self.sh(host, _RESET), chosen))

    def host(self, name: str) -> Host:
        """For looking at a host as the code does, by SSH as root."""
        with self._looking:
            if self._fleet is None:
                self.inventory("looking", [machine.name for machine in self.machines])
                self._fleet = Fleet(model.load(self.root / "inventories" / "looking.yml"))
                (self.root / "inventories" / "looking.yml").unlink()
            return self._fleet[name]

    def copy_image(self, image: str, source: str, target: str) -> None:
        """As an operator may do by hand."""
        save = f"docker exec {self.container(source)} docker save {image}"
        load = f"docker exec -i {self.container(target)} docker load"
        subprocess.run(["sh", "-c", f"{save} | {load}"], check=True, capture_output=True, timeout=120)

    def image(self, host: str) -> str:
        """Made of the host's own programs."""
        self.sh(
            host,
            "docker image inspect tiny >/dev/null 2>&1 || tar -chPf - /bin/sleep /bin/echo "
            "$(ldd /bin/sleep /bin/echo | grep -o '/[^ ]*' | grep -v : | sort -u) | docker import - tiny >/dev/null",
        )
        return "tiny"

    def disconnect(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._fleet = None


def _started(process: int) -> str:
    """When a process of this machine began (proc_pid_stat(5), field 22): numbers come again, a pair does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def eventually(good: Callable[[], Any], seconds: float, what: str = "") -> float:
    """Wait until something holds; after how many seconds it did. Fails the test when it does not."""
    began = time.monotonic()
    while not good():
        assert time.monotonic() - began < SLOW * seconds, f"not within {seconds:g} s: {what or good}"
        # less and less often: labs share the machine, and looking is not free
        time.sleep(min(0.05 + (time.monotonic() - began) / 10, 0.5))
    return time.monotonic() - began


def pytest_configure(config: pytest.Config) -> None:
    """A session that is asked to end (SIGTERM) tears its labs down; pytest itself does so for SIGINT only."""

    def end(number: int, frame: Any) -> None:
        pytest.exit("terminated", 128 + number)

    signal.signal(signal.SIGTERM, end)


# Files that take longest, in this order: with --dist loadfile, what begins late and takes long would be waited for.
_FIRST = (
    *("test_vm", "test_verify", "test_deploy_faults", "test_move_faults", "test_runbooks", "test_move_edge"),
    *("test_nat", "test_bootstrap", "test_deploy", "test_move", "test_mail", "test_check", "test_bootstrap_faults"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; virtual hosts get their time."""
    rank = {name: number for number, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if DRIVER != "vm":
        return
    for item in items:
        given = item.get_closest_marker("timeout")
        item.add_marker(pytest.mark.timeout(SLOW * (given.args[0] if given else 600)), append=False)


@contextlib.contextmanager
def _clearly() -> Iterator[None]:
    """Without Docker lab tests fail, with a sentence; a skip would look like success."""
    try:
        yield
    except SwarmmailError as error:
        pytest.fail(f"the lab tests need Docker on this machine: {error}", pytrace=False)


def _build_stack() -> None:
    """Once: labs that build the same at the same time make different layers of it, and a host is then sent all of
    what it has already."""
    inventory = model.load(REPO / "inventories" / "example.yml")
    where = images.builder(Fleet(inventory), "local")
    for service in stacks.read(inventory).services.values():
        if service.build is not None:
            images.build(where, service.build, service.image)


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A folder whose name the next session finds again: a lab's names derive from its folder, so what a killed
    session left can be removed. Sessions at the same time (they hold a lock on their folder) do not meet."""
    digest = hashlib.sha256(str(REPO).encode()).hexdigest()[:8]
    base = Path(tempfile.gettempdir()) / f"swarmmail-tests-{getpass.getuser()}-{digest}"
    mine: Path | None = None
    with contextlib.ExitStack() as locks:
        for number in range(1, 10):
            folder = base / str(number)
            if mine is not None and not folder.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            locks.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for left in sorted(folder.iterdir()):
                with _clearly():
                    Project(left).remove()
            mine = mine or folder
        assert mine is not None, f"nine sessions run in {base}"
        with (base / "image").open("w") as one, _clearly():  # sessions that begin at once: one of them makes it
            fcntl.flock(one, fcntl.LOCK_EX)
            image.ensure(docker.from_env(), "host")
            _build_stack()
        yield mine
        for left in sorted(mine.iterdir()):
            Project(left).remove()


@contextlib.contextmanager
def temporary(place: Path, name: str, driver: str = DRIVER) -> Iterator[Project]:
    """A project that ends with the block, and its lab with it."""
    made = Project(place / name)
    made.make()
    if driver == "vm":
        made.ask_seldom()
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="session")
def project(place: Path) -> Iterator[Project]:
    with temporary(place, "main") as made:
        yield made


@pytest.fixture
def make_project(place: Path) -> Iterator[Callable[[str], Project]]:
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(temporary(place, name))


@pytest.fixture(scope="session")
def _hosts(project: Project) -> Project:
    with _clearly():
        project.up(len(HOSTS), driver=DRIVER)
    project.inventory(CLUSTER)
    return project


@pytest.fixture
def lab(_hosts: Project) -> Project:
    if any(machine.state != "running" for machine in _hosts.machines):
        _hosts.up(len(HOSTS))
    return _hosts


@pytest.fixture
def fresh(lab: Project) -> Project:
    lab.reset()
    return lab


@pytest.fixture
def clustered(lab: Project) -> Project:
    if lab.known.still("hosts"):
        return lab
    if lab.bootstrap(CLUSTER, "--no-check").status != 0:
        lab.reset()
        lab.bootstrap(CLUSTER, "--no-check", check=0)
    lab.known.remember("hosts")
    return lab


def deploy_all(lab: Project) -> Project:
    lab.inventory(MAIL, stack=STACK)
    if lab.known.still("hosts", "stack"):
        return lab
    both = functools.partial(
        lab.fab, "bootstrap", "--no-check", "deploy", "--no-verify", env={"SWARMMAIL_INVENTORY": MAIL}, timeout=300
    )
    if both().status != 0:
        lab.reset()
        both(check=0)
    lab.known.remember("hosts", "stack")
    return lab


@pytest.fixture
def deployed(lab: Project) -> Project:
    return deploy_all(lab)


@pytest.fixture
def mailing(deployed: Project) -> Project:
    from moving import accounts_for

    accounts_for(deployed)
    return deployed


@pytest.fixture(scope="module")
def back_to_the_beginning(_hosts: Project) -> Iterator[None]:
    """For files whose tests move services: others expect each where the inventory begins it."""
    yield
    _hosts.reset()


@pytest.fixture
def empty(clustered: Project) -> Project:
    from mailing import undeploy  # which imports this module

    clustered.inventory(MAIL, stack=STACK)
    undeploy(clustered)
    return clustered


@pytest.fixture
def fab(project: Project) -> Callable[..., Result]:
    return project.fab
