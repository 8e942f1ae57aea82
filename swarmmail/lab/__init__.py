"""Several real hosts on one machine, for trying and testing: ``up``, ``status``, ``down``.

Every other part of swarmmail treats them like hosts anywhere: by the inventory and over SSH.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from swarmmail import report
from swarmmail.lab import faults, files
from swarmmail.lab.containers import ContainerDriver
from swarmmail.lab.driver import Access, Driver, Kind, Machine
from swarmmail.lab.naming import INSIDE, MAX_BARE, MAX_HOSTS, TOPOLOGIES, Naming, Planned, Subnets, addresses, planned
from swarmmail.lab.vms import VmDriver
from swarmmail.model.errors import InputError, Locked, SwarmmailError

__all__ = ["Lab", "Machine", "clock", "cut", "down", "driver_of", "mend", "modules", "power", "status", "up"]

HOSTS: dict[Kind, int] = {"container": 3, "vm": 2}
"""The drivers, and how many hosts each makes unless told otherwise."""
EMULATED = 60
"""Seconds that an emulated host may take to let somebody in: 1 on a quiet machine, more where others work too."""


@dataclass(frozen=True)
class Lab:
    """A lab as it is. ``changed``: what the call that returned it did, a line each."""

    root: Path
    subnets: Subnets | None  # None: there is no lab
    machines: tuple[Machine, ...]
    changed: tuple[str, ...] = ()
    router: str = ""
    """The state of the router's container; empty where there is none (topology ``flat``)."""
    cuts: tuple[str, ...] = ()
    """What is lost on purpose, a line each."""

    @property
    def subnet(self) -> str | None:
        return str(self.subnets.outer) if self.subnets else None

    @property
    def folder(self) -> Path:
        return files.folder(self.root)

    @property
    def inventory(self) -> Path:
        return files.inventory_path(self.root)

    @property
    def key(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def bridge(self) -> str:
        """The device of this machine that every packet between the hosts crosses: where to capture."""
        return Naming.of(self.root).bridge

    def container(self, host: str) -> str:
        """Name of the host's container: for pulling its plug (``docker stop``, ``kill``, ``restart``)."""
        return Naming.of(self.root).container(host)

    def address(self, host: str) -> str:
        return next(machine.address for machine in self.machines if machine.name == host)


def driver_of(root: Path, wanted: str = "") -> Driver:
    """What makes the machines of the folder ``root``: of the kind that is there, else ``wanted``, else containers.

    Raises SwarmmailError when those that are there are of another kind than wanted.
    """
    naming, home = Naming.of(root), files.folder(root)
    virtual = VmDriver(naming, home)
    there = "vm" if virtual.exists() else "container" if home.exists() else ""
    if there and wanted not in ("", there):
        raise SwarmmailError(
            f"the lab that is here is of driver {there}, asked for is {wanted}",
            step="lab.up --driver",
            hint=f"lab.down (the hosts' data goes with it), then lab.up --driver {wanted}",
        )
    return virtual if (there or wanted) == "vm" else ContainerDriver(naming)


def up(root: Path, hosts: int | None = None, bare: int = 0, topology: str = "", driver: str = "") -> Lab:
    """Make or complete the lab of the folder ``root``: ``host1``.. with Docker, ``bare1``.. without.

    ``hosts`` None: as many as ``HOSTS`` says.
    ``driver``: ``container`` or ``vm``. Empty: as the lab that is there, else containers.
    ``topology``: ``flat``, all hosts on one network; ``nat``, ``host3`` on a network of its own behind a router that
    translates addresses. Empty: as the lab that is there, else flat.
    Hosts that are there stay as they are, also when more are there than asked for. Returns when SSH (and
    Docker) answers on all of them. Killed anywhere, it completes when run again.
    """
    problems = []
    if hosts is not None and not 1 <= hosts <= MAX_HOSTS:
        problems.append(f"hosts: {hosts}, allowed are 1 to {MAX_HOSTS}")
    if not 0 <= bare <= MAX_BARE:
        problems.append(f"bare: {bare}, allowed are 0 to {MAX_BARE}")
    if topology and topology not in TOPOLOGIES:
        problems.append(f"topology: found '{topology}', allowed: {', '.join(TOPOLOGIES)}")
    if topology == "nat" and hosts is not None and hosts < 3:
        problems.append(f"hosts: {hosts}, with topology nat 3 at least: {INSIDE} is the one behind the router")
    if driver and driver not in HOSTS:
        problems.append(f"driver: found '{driver}', allowed: {', '.join(HOSTS)}")
    if problems:
        raise InputError(problems)
    root = root.resolve()
    with _alone(root):
        chosen = driver_of(root, driver)
        if files.leaving(root).exists():
            report.progress("the last lab.down was cut short; finishing it first")
            _remove(root, chosen)
            chosen = driver_of(root, driver)
        subnets = chosen.network(TOPOLOGIES.get(topology))
        access = files.access(root)
        files.certificates(root, addresses(subnets))
        # Those that are there beyond what is asked for belong to the lab as well: they stay, and are started.
        there = {machine.name for machine in chosen.machines()}
        asked = planned(HOSTS[chosen.kind] if hosts is None else hosts, bare)
        wanted = [host for host in planned(MAX_HOSTS, MAX_BARE) if host in asked or host.name in there]
        return _bring(root, chosen, subnets, wanted, access)


def _bring(root: Path, driver: Driver, subnets: Subnets, wanted: Sequence[Planned], access: Access) -> Lab:
    changed = driver.ensure(wanted, access)
    machines = driver.machines()
    keys = driver.host_keys([machine.name for machine in machines])
    lab = Lab(root, subnets, tuple(machines), tuple(changed), driver.router())
    lab.inventory.parent.mkdir(exist_ok=True)
    files.write(lab.known_hosts, files.known_hosts(machines, keys))
    text = files.inventory(machines, EMULATED if driver.kind == "vm" else None)
    if files.write(lab.inventory, text, mode=0o644):
        lab = replace(lab, changed=(*lab.changed, "inventories/lab.yml"))
    return lab


def status(root: Path) -> Lab:
    """The lab of the folder ``root`` as it is, with the memory of each host. Changes nothing."""
    root = root.resolve()
    driver = driver_of(root)
    return Lab(
        root,
        driver.find_network(),
        tuple(driver.machines(memory=True)),
        router=driver.router(),
        cuts=tuple(faults.there(driver, Naming.of(root))),
    )


def down(root: Path, images: bool = False) -> list[str]:
    """Remove the lab of the folder ``root`` without a trace: what was removed, a line each.

    The images stay, so that the next ``up`` takes seconds; ``images=True`` removes them too.
    """
    root = root.resolve()
    with _alone(root):
        return _remove(root, driver_of(root), images)


def power(root: Path, host: str, state: str) -> list[str]:
    """``off``: as if the plug was pulled, what was not on the disk is lost. ``on``: until SSH and Docker answer.
    ``reset``: both. The names of the hosts that are another now."""
    if state not in faults.POWER:
        raise InputError([f"lab.power: found '{state}', allowed: {', '.join(faults.POWER)}"])
    root = root.resolve()
    with _alone(root):
        driver = driver_of(root)
        faults.need_hosts(driver, [host])
        changed: list[str] = []
        if state != "on":
            driver.power_off(host)
            changed = [host]
        if state != "off":
            subnets = driver.find_network()
            assert subnets is not None
            wanted = [one for one in planned(MAX_HOSTS, MAX_BARE) if one.name == host]
            changed += _bring(root, driver, subnets, wanted, files.access(root)).changed
        return changed


def cut(root: Path, host: str = "", between: Sequence[str] = (), only: str = "all", one_way: bool = False) -> None:
    """Lose what passes between two hosts, or between one and everybody, this machine included. ``one_way``: only what
    the first of the two, or the one, sends. ``only``: of this protocol."""
    driver = driver_of(root.resolve())
    faults.cut(driver, Naming.of(root), faults.cuts(host, between, only, one_way))


def mend(root: Path) -> list[str]:
    """Take all cuts back; what they were."""
    return faults.mend(driver_of(root.resolve()), Naming.of(root))


def clock(root: Path, host: str, seconds: float) -> None:
    """Set a host's clock ahead of this machine's, or behind it; 0: right again."""
    faults.set_clock(driver_of(root.resolve()), host, seconds)


def modules(root: Path, host: str, forbidden: Sequence[str]) -> None:
    """Forbid a host's kernel these modules, and no others."""
    faults.forbid(driver_of(root.resolve()), host, forbidden)


def _remove(root: Path, driver: Driver, images: bool = False) -> list[str]:
    if files.folder(root).exists():
        files.leaving(root).touch(mode=0o600)
    cut_back = [f"cut {one}" for one in faults.mend(driver, Naming.of(root))]
    return cut_back + driver.remove(images) + files.remove(root)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep a second ``up`` or ``down`` of the same folder out.

    The lock is on the folder itself: it leaves no file, and ends with the process (flock(2)).
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked("another lab.up or lab.down is at work in this folder", step="lab") from error
        yield
    finally:
        os.close(handle)
