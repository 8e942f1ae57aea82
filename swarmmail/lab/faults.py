"""Faults for tests, and for people who want to rehearse: lost power, cut cables, wrong clocks, missing modules."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from swarmmail.lab.driver import Driver
from swarmmail.lab.naming import Naming
from swarmmail.lab.vms import VmDriver
from swarmmail.model.errors import InputError, SwarmmailError
from swarmmail.model.network import DATA_PORT

POWER = ("off", "on", "reset")
PROTOCOLS = {
    "all": "",
    "esp": "ip protocol esp",
    "icmp": "ip protocol icmp",
    "tcp": "ip protocol tcp",
    "udp": "ip protocol udp",
    "vxlan": f"udp dport {DATA_PORT}",
}
"""What a cut takes away, as nft(8) writes it."""
_FORBIDDEN = "/etc/modprobe.d/lab.conf"
_HOOKS = ("forward", "input", "output")
"""Between hosts; and between a host and this machine, where the bridge is a link of its own."""


@dataclass(frozen=True)
class Cut:
    """Packets that are lost. Without ``target``, all that ``source`` sends; without ``source``, all that the target is
    sent."""

    source: str = ""
    target: str = ""
    what: str = "all"

    def rule(self, addresses: dict[str, str]) -> str:
        """The rule that loses them, for a chain of nftables' family ``bridge``."""
        parts = [
            f"ip saddr {addresses[self.source]}" if self.source else "",
            f"ip daddr {addresses[self.target]}" if self.target else "",
            PROTOCOLS[self.what],
            "counter drop",
            f'comment "{self.source or "all"} to {self.target or "all"}: {self.what}"',
        ]
        return " ".join(part for part in parts if part)


def cuts(host: str, between: Sequence[str], what: str, one_way: bool) -> list[Cut]:
    """The cuts that are asked for. Raises InputError."""
    problems = []
    if bool(host) == bool(between):
        problems.append("name --host HOST, or --between HOST,HOST")
    if between and len(set(between)) != 2:
        problems.append(f"--between: found '{','.join(between)}', allowed: two hosts, as in host1,host2")
    if what not in PROTOCOLS:
        problems.append(f"--only: found '{what}', allowed: {', '.join(PROTOCOLS)}")
    if problems:
        raise InputError(problems)
    first, second = between or (host, "")
    there, back = Cut(first, second, what), Cut(second, first, what)
    return [there] if one_way else [there, back]


def cut(driver: Driver, naming: Naming, wanted: Sequence[Cut]) -> None:
    """Lose packets from now on, also those of connections that are open.

    Raises SwarmmailError where the machine's kernel has no nftables for bridges.
    """
    addresses = {machine.name: machine.address for machine in driver.machines()}
    need_hosts(driver, [name for one in wanted for name in (one.source, one.target) if name])
    table = _table(naming)
    lines = [f"add table bridge {table}"]
    for hook in _HOOKS:
        lines.append(f"add chain bridge {table} {hook} {{ type filter hook {hook} priority 0; }}")
        lines += [f"add rule bridge {table} {hook} {one.rule(addresses)}" for one in wanted]
    _nft(driver, "\n".join(lines) + "\n")


def mend(driver: Driver, naming: Naming) -> list[str]:
    """Take all cuts back; what they were."""
    found = there(driver, naming)
    if found:
        _nft(driver, f"delete table bridge {_table(naming)}\n")
    return found


def there(driver: Driver, naming: Naming) -> list[str]:
    """The cuts that are in force, a line each."""
    command = [*driver.enter(), "nft", "list", "chain", "bridge", _table(naming), "forward"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # without nftables nothing was cut
        return []
    return re.findall(r'comment "([^"]+)"', done.stdout)


def _table(naming: Naming) -> str:
    return f"swarmmail_{naming.id}"


def _nft(driver: Driver, script: str) -> None:
    try:
        done = subprocess.run(
            [*driver.enter(), "nft", "-f", "-"], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise SwarmmailError(str(error), step="lab.cut", hint="apt-get install nftables") from None
    if done.returncode:
        raise SwarmmailError(done.stderr.strip().splitlines()[0], step="lab.cut", hint="it needs root")


def need_hosts(driver: Driver, names: Sequence[str]) -> None:
    """Raises InputError for names that no host of the lab has."""
    known = [machine.name for machine in driver.machines()]
    if wrong := [name for name in names if name not in known]:
        raise InputError([f"no host {name} in the lab, there are: {', '.join(known) or 'none'}" for name in wrong])


def _own_kernel(driver: Driver, host: str, what: str) -> VmDriver:
    need_hosts(driver, [host])
    if not isinstance(driver, VmDriver):
        raise InputError([f"{what}: container hosts have this machine's; make the lab with --driver vm"])
    return driver


def set_clock(driver: Driver, host: str, seconds: float) -> None:
    """Set a host's clock ahead of this machine's (or behind: a negative number). 0 sets it right again."""
    with _own_kernel(driver, host, "clock").ssh(host) as connection:
        connection.run(f"date -s @{time.time() + seconds:.3f}", step="lab.clock")


def forbid(driver: Driver, host: str, modules: Sequence[str]) -> None:
    """Keep a host's kernel from loading modules; unload those that nothing uses. None: allow all again."""
    if wrong := [name for name in modules if not re.fullmatch(r"[a-z0-9_]+", name)]:
        raise InputError([f"--forbid: '{name}' is no name of a module" for name in wrong])
    with _own_kernel(driver, host, "module").ssh(host) as connection:
        text = "".join(f"install {name} /bin/false\n" for name in modules)
        connection.write(_FORBIDDEN, text, step="lab.module")
        for name in modules:
            result = connection.run(
                f"! [ -d /sys/module/{name} ] || modprobe -r {name}", step="lab.module", check=False
            )
            if not result.ok:
                raise SwarmmailError(
                    f"{name} is in use ({result.stderr.strip()}); it is not loaded any more at the next start",
                    host=host,
                    step="lab.module",
                    hint=f"lab.power reset --host {host}",
                )
