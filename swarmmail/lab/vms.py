"""Lab hosts as virtual machines, with kernels of their own: QEMU on a bridge in a network namespace of its own.

By this machine's hardware (KVM) where that runs a stock kernel, else by software, which takes about half a minute to
boot. The namespace has no uplink: a veth leads into it from this machine, which forwards nothing that comes by it.
State is a folder a host (disk, log, process id), and the namespace, in which all processes of the lab run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from swarmmail import report
from swarmmail.hosts.connection import Host
from swarmmail.lab import files, vmimage
from swarmmail.lab.driver import Access, Kind, Machine
from swarmmail.lab.naming import MAX_BARE, MAX_HOSTS, Naming, Planned, Subnets, Topology, planned, routes
from swarmmail.lab.vmimage import Base, Entry
from swarmmail.model.errors import HostError, InputError, SwarmmailError
from swarmmail.model.inventory import Host as Spec

MEMORY = 1280  # MiB a host: Docker, four services and their images
_BOOT = 400  # seconds until SSH answers: 20 to 30 when emulated on a quiet machine
_DOCKER = 300  # seconds for the host's Docker, counted from SSH's answer
_GONE = 15  # seconds for a killed process to end
_GATEWAY = 2
"""Number of the bridge's own address: the hosts' way out, which leads nowhere, and says so at once. Nobody answers to
DNS there either: a resolver that is silent would cost 20 s for each name."""

_ANEW = "lab.down, then lab.up: makes the lab anew"
_FILE, _SECRET, _FOLDER, _PRIVATE = 0o100644, 0o100600, 0o40755, 0o40700


@dataclass(frozen=True)
class _Files:
    """What a host has on this machine."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.qcow2"

    @property
    def console(self) -> Path:
        return self.folder / "console.log"

    @property
    def process(self) -> Path:
        return self.folder / "process"

    @property
    def key(self) -> Path:
        return self.folder / "ssh_host_ed25519_key"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    def running(self) -> int | None:
        """The process of the machine; None when it is off."""
        try:
            number = int(self.process.read_text())
            command = Path(f"/proc/{number}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return number if str(self.disk).encode() in command else None


class VmDriver:
    """The lab of one folder, as virtual machines. ``home``: its ``.lab``."""

    kind: Kind = "vm"

    def __init__(self, naming: Naming, home: Path) -> None:
        self.naming = naming
        self.home = home
        self.folder = home / "vm"

    def exists(self) -> bool:
        """Whether there is anything of it; its folder may be gone while its machines still run."""
        return self.folder.exists() or self.namespace.exists()

    def _of(self, host: str) -> _Files:
        return _Files(self.folder / host)

    # --- network ---

    @property
    def namespace(self) -> Path:
        return Path("/run/netns") / self.naming.network

    def enter(self) -> list[str]:
        return ["nsenter", f"--net={self.namespace}"]

    def network(self, topology: Topology | None) -> Subnets:
        if topology == "nat":
            raise InputError(["--topology nat: not with virtual hosts (--driver container has it)"])
        vmimage.need_programs()
        found = self.find_network()
        if found is None:
            self.remove()  # what runs of a lab whose folder was taken away can't be used any more
            self.home.mkdir(mode=0o700, exist_ok=True)
            self.folder.mkdir(mode=0o700)
            table = Path("/proc/net/route").read_text()
            taken = [network for _, network in routes(table) if network.prefixlen]
            found = Subnets(next(self.naming.subnets(taken)))
            files.write(self.folder / "subnet", f"{found.outer}\n")
        if not self.namespace.exists() or not self._has(self.naming.bridge):
            self._make(found.outer)
            report.progress(f"network {found.outer} made (bridge {self.naming.bridge} in its own namespace)")
        return found

    def find_network(self) -> Subnets | None:
        file = self.folder / "subnet"
        return Subnets(IPv4Network(file.read_text().strip())) if file.exists() else None

    def _make(self, subnet: IPv4Network) -> None:
        name, bridge, uplink = self.naming.network, self.naming.bridge, self.naming.uplink
        self._unmake()
        _do("ip", "netns", "add", name)
        _do("ip", "link", "add", uplink, "type", "veth", "peer", "name", "uplink", "netns", name)
        Path(f"/proc/sys/net/ipv4/conf/{uplink}/forwarding").write_text("0")
        _do("ip", "addr", "add", f"{subnet.network_address + 1}/{subnet.prefixlen}", "dev", uplink)
        _do("ip", "link", "set", uplink, "up")
        for words in (
            "link set lo up",
            f"link add {bridge} type bridge",
            f"addr add {subnet.network_address + _GATEWAY}/{subnet.prefixlen} dev {bridge}",
            f"link set uplink master {bridge} up",
            f"link set {bridge} up",  # last: `network` takes it for the sign that all is done
        ):
            _do("ip", "-n", name, *words.split())

    def _unmake(self) -> list[str]:
        removed = []
        if Path(f"/sys/class/net/{self.naming.uplink}").exists():
            _do("ip", "link", "del", self.naming.uplink)
            removed.append(f"link {self.naming.uplink}")
        if self.namespace.exists():
            _do("ip", "netns", "del", self.naming.network)
            removed.append(f"network namespace {self.naming.network}")
        return removed

    def _has(self, link: str) -> bool:
        done = subprocess.run(
            ["ip", "-n", self.naming.network, "link", "show", "up", "dev", link],
            capture_output=True,
            text=True,
            check=False,
        )
        return bool(done.stdout.strip())

    def router(self) -> str:
        return ""

    # --- machines ---

    def machines(self, memory: bool = False) -> list[Machine]:
        subnets = self.find_network()
        if subnets is None:
            return []
        found = []
        for host in planned(MAX_HOSTS, MAX_BARE):
            own = self._of(host.name)
            if own.disk.exists():
                process = own.running()
                found.append(
                    Machine(
                        name=host.name,
                        address=subnets.address(host),
                        variant=host.variant,
                        state="off" if process is None else "running",
                        memory=_resident(process) if memory and process else None,
                    )
                )
        return found

    def ensure(self, wanted: Sequence[Planned], access: Access) -> list[str]:
        subnets = self.find_network()
        if subnets is None:
            raise SwarmmailError("the lab's network is gone", step="lab", hint=_ANEW)
        if any(host.variant == "bare" for host in wanted):
            raise InputError(["--bare: not with virtual hosts (--driver container has them)"])
        base = vmimage.ensure()
        starting = [host for host in wanted if self._of(host.name).running() is None]
        how = vmimage.accelerator(base) if starting else ""
        if starting:
            words = "by the machine's own virtualization (KVM)" if how == vmimage.HARDWARE else "emulated by software"
            report.progress(f"{len(starting)} hosts start, {words}")

        def bring(host: Planned) -> str | None:
            if host not in starting:
                return None
            began = time.monotonic()
            new = not self._of(host.name).disk.exists()
            self._start(host, subnets, base, how, access)
            version = self._wait(host, subnets.address(host))
            report.progress(
                f"{'made' if new else 'started'}; SSH and Docker {version} answer at {subnets.address(host)} "
                f"after {time.monotonic() - began:.1f} s",
                host.name,
            )
            return host.name

        with ThreadPoolExecutor(max_workers=max(1, len(wanted))) as pool:
            jobs = [pool.submit(bring, host) for host in wanted]
        return [name for job in jobs if (name := job.result())]

    def _start(self, host: Planned, subnets: Subnets, base: Base, how: str, access: Access) -> None:
        own = self._of(host.name)
        own.folder.mkdir(mode=0o700, exist_ok=True)
        if not own.key.exists():
            private, public = files.key_pair()
            files.write(own.key.with_suffix(".pub"), public + "\n")
            files.write(own.key, private)
        files.write(own.initrd, base.initrd(self._contents(host, subnets, access)))
        if not own.disk.exists():
            fresh = own.disk.with_suffix(".new")
            _do("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base.disk), "-F", "raw", str(fresh))
            fresh.rename(own.disk)
        tap = f"tap-{host.name}"
        if not self._has(tap):
            with contextlib.suppress(SwarmmailError):  # it may be there, of a start that was killed
                _do("ip", "-n", self.naming.network, "tuntap", "add", "dev", tap, "mode", "tap")
            _do("ip", "-n", self.naming.network, "link", "set", tap, "master", self.naming.bridge, "up")
        # cache=unsafe spares this machine's disk; what the guest has flushed outlives the end of QEMU all the same,
        # since it is in this machine's page cache then (qemu, block/io.c, bdrv_co_flush).
        _do(
            *self.enter(),
            *vmimage.machine(how, MEMORY),
            *("-name", self.naming.container(host.name), "-daemonize", "-pidfile", str(own.process)),
            *("-serial", f"file:{own.console}", "-device", "virtio-rng-pci"),
            *("-drive", f"id=disk,if=none,file={own.disk},format=qcow2,cache=unsafe,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=disk"),
            *("-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net,romfile=,mac={self._mac(host)}"),
            *vmimage.boot(base, own.initrd),
            host=host.name,
        )

    def _mac(self, host: Planned) -> str:
        """A locally administered address, the same for life."""
        return f"02:{':'.join(self.naming.id[i : i + 2] for i in range(0, 8, 2))}:{host.number:02x}"

    def _contents(self, host: Planned, subnets: Subnets, access: Access) -> list[Entry]:
        """What only this host has: read by ``vm/init`` at each start."""
        own = self._of(host.name)
        gateway = subnets.outer.network_address + _GATEWAY
        address = f"ADDRESS={subnets.address(host)}/{subnets.outer.prefixlen}\nGATEWAY={gateway}\n"
        key = f"{access.public_key}\n".encode()
        machine_id = hashlib.sha256(f"{self.naming.id} {host.name}".encode()).hexdigest()[:32]
        entries = [
            Entry("address", _FILE, address.encode()),
            *(Entry(f"lab{name}", _FOLDER) for name in ("", "/etc", "/etc/ssh", "/home")),
            Entry("lab/etc/hostname", _FILE, f"{host.name}\n".encode()),
            Entry("lab/etc/hosts", _FILE, f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n".encode()),
            Entry("lab/etc/machine-id", 0o100444, f"{machine_id}\n".encode()),
            Entry("lab/etc/resolv.conf", _FILE, f"nameserver {gateway}\n".encode()),
            Entry("lab/etc/lab-password", _SECRET, f"admin:{access.sudo_password}\n".encode()),
            Entry("lab/etc/ssh/ssh_host_ed25519_key", _SECRET, own.key.read_bytes()),
            Entry("lab/etc/ssh/ssh_host_ed25519_key.pub", _FILE, own.key.with_suffix(".pub").read_bytes()),
        ]
        for home, owner in (("root", 0), ("home/admin", 1000), ("home/deploy", 1001)):
            entries += [
                Entry(f"lab/{home}", _PRIVATE, owner=owner),
                Entry(f"lab/{home}/.ssh", _PRIVATE, owner=owner),
                Entry(f"lab/{home}/.ssh/authorized_keys", _SECRET, key, owner),
            ]
        return entries

    def _wait(self, host: Planned, address: str) -> str:
        """Until SSH and Docker answer: Docker's version. Raises SwarmmailError with the console's last words."""
        own = self._of(host.name)
        try:
            _until(lambda: _banner(address), _BOOT, lambda: own.running() is not None)
            with self.ssh(host.name) as connection:
                connection.run("systemctl start docker.service", step="start Docker", timeout=_DOCKER)
                version = connection.run(
                    "docker version -f '{{.Server.Version}}'", step="ask Docker", timeout=60
                ).stdout.strip()
        except (OSError, HostError) as error:
            raise SwarmmailError(
                f"{error}; the machine is {'off' if own.running() is None else 'on'}\n{_last_words(own)}",
                host=host.name,
                step="boot",
                hint=_ANEW,
            ) from error
        return version.partition("+")[0]

    @contextlib.contextmanager
    def ssh(self, host: str) -> Iterator[Host]:
        """A connection by the lab's key, without an inventory (at the first start there is none)."""
        own = self._of(host)
        known = own.folder / "known_hosts"
        address = next(machine.address for machine in self.machines() if machine.name == host)
        files.write(known, f"{address} {own.key.with_suffix('.pub').read_text()}")
        spec = Spec(
            name=host,
            address=address,
            role="worker",
            advertise=address,
            user="root",
            key=self.home / "id_ed25519",
            known_hosts=known,
            connect_timeout=60,
        )
        connection = Host(spec)
        try:
            yield connection
        finally:
            connection.close()

    def host_keys(self, names: Sequence[str]) -> dict[str, str]:
        return {name: self._of(name).key.with_suffix(".pub").read_text().strip() for name in names}

    # --- the end ---

    def power_off(self, host: str) -> None:
        own = self._of(host)
        if (process := own.running()) is not None:
            _kill([process])

    def remove(self, images: bool = False) -> list[str]:
        removed = []
        if self.namespace.exists():
            done = subprocess.run(
                ["ip", "netns", "pids", self.naming.network], capture_output=True, text=True, check=False
            )
            processes = [int(word) for word in done.stdout.split()]
            _kill(processes)
            removed += [f"process {number}" for number in processes]
        removed += self._unmake()
        if self.folder.exists():
            hosts = [machine.name for machine in self.machines()]
            shutil.rmtree(self.folder)
            removed += [f"host {name}" for name in hosts]
        return removed + (vmimage.remove_all() if images else [])


def _do(*words: str, host: str | None = None) -> None:
    """Run a program of this machine. Raises SwarmmailError with what it said."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise SwarmmailError(f"{said} (from: {' '.join(words)[:200]})", host=host, step="lab", hint=_ANEW)


def _kill(processes: Sequence[int]) -> None:
    for number in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + _GONE
    while any(_alive(number) for number in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def _alive(number: int) -> bool:
    """A zombie counts as gone: it holds nothing any more."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _resident(process: int) -> int | None:
    """Bytes of this machine's memory that a process holds."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), None)


def _banner(address: str) -> None:
    with socket.create_connection((address, 22), timeout=5) as connection:
        connection.settimeout(30)
        if not connection.recv(64).startswith(b"SSH-2.0-"):
            raise ConnectionError("no SSH banner")


def _until(good: Callable[[], None], seconds: float, alive: Callable[[], bool]) -> None:
    """Raises what ``good`` raises when the time is over, or nobody is alive."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return good()
        except OSError:
            if time.monotonic() > deadline or not alive():
                raise
        time.sleep(0.2)


def _last_words(own: _Files) -> str:
    try:
        return own.console.read_text(errors="replace")[-800:].strip() or "(it said nothing on its console)"
    except OSError:
        return "(it has no console)"
