"""Doors of the lab."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from swarmmail import lab, report
from swarmmail.model.errors import InputError
from swarmmail.tasks.door import door, duration, project


def _number(option: str, text: str) -> int:
    """Invoke would end a wrong number with a traceback."""
    if not text.isdigit():
        raise InputError([f"--{option}: found '{text}', allowed: a number"])
    return int(text)


def _show(found: lab.Lab) -> None:
    subnets = found.subnets
    title = f"lab {found.subnet}"
    if subnets and subnets.inner:
        title += f", {subnets.inner} behind a router at {subnets.router} ({found.router or 'gone'})"
    report.table(
        title,
        ["host", "address", "state", "variant", "memory"],
        [
            [
                machine.name,
                machine.address,
                machine.state,
                machine.variant,
                "" if machine.memory is None else f"{machine.memory / 2**20:.0f} MiB",
            ]
            for machine in found.machines
        ],
    )
    for line in found.cuts:
        report.result(f"cut: {line}")


@door
def up(c: Any, hosts: str = "", bare: str = "0", topology: str = "", driver: str = "") -> None:
    """Make hosts on this machine (containers of its Docker, or virtual machines) and the inventory `lab`.

    --driver container (what a new lab gets): three hosts, ready in seconds, with this machine's kernel. --driver vm:
    two hosts with kernels of their own, by QEMU, ready in a minute; needs root.
    --hosts N: host1 to hostN, with Docker. --bare N: also bare1 to bareN, without. Hosts that are there stay
    as they are, also those beyond N. --topology nat: host3 is on a network of its own, behind a router that
    translates addresses; flat (what a new lab gets): all hosts on one network. Changes on this machine:
    containers, volumes and networks of its Docker, or processes and a network namespace; the folder .lab and the file
    inventories/lab.yml; for vm, a cache of about 500 MB in ~/.cache/swarmmail.
    """
    wanted = _number("hosts", hosts) if hosts else None
    more = _number("bare", bare)
    made = lab.up(project().resolve(), wanted, more, topology, driver)
    _show(lab.status(made.root))
    if wanted is not None and len(made.machines) > wanted + more:
        report.result(f"{len(made.machines)} hosts stay: lab.up removes none, lab.down removes the whole lab")
    if made.changed:
        report.result(f"lab is up (changed: {', '.join(made.changed)})", good=True)
    else:
        report.result("lab is up already, nothing changed", good=True)


@door
def status(c: Any, json: bool = False) -> None:
    """Show the lab's hosts: address, state, memory. Changes nothing."""
    found = lab.status(project().resolve())
    if json:
        report.document(
            {
                "subnet": found.subnet,
                "topology": found.subnets.topology if found.subnets else None,
                "router": found.router or None,
                "cuts": found.cuts,
                "hosts": [asdict(machine) for machine in found.machines],
            }
        )
    elif found.machines:
        _show(found)
    else:
        report.result("no lab here; lab.up makes one")


@door
def down(c: Any, images: bool = False) -> None:
    """Remove the lab without a trace: hosts with all their data, network, .lab, inventories/lab.yml.

    The images stay as a cache; --images removes them as well.
    """
    removed = lab.down(project().resolve(), images)
    for line in removed:
        report.progress(f"removed {line}")
    report.result("the lab is gone" if removed else "there was no lab, nothing removed", good=True)


@door
def power(c: Any, state: str, host: str = "") -> None:
    """Pull a host's plug, or put it in again: lab.power off|on|reset --host HOST.

    off: nothing is shut down, what was not on the disk is lost; lab.up starts it again as well. reset: off and on.
    """
    lab.power(project().resolve(), host, state)
    report.result(f"{host} is {'off' if state == 'off' else 'on, SSH and Docker answer'}", good=True)


@door
def cut(c: Any, host: str = "", between: str = "", only: str = "all", one_way: bool = False) -> None:
    """Lose packets on the way: --host HOST (all that it sends and gets), or --between HOST,HOST. lab.mend ends it.

    --only esp, icmp, tcp, udp or vxlan: others pass. --one-way: only what the first of the two sends (or the one).
    Changes on this machine: a table of nftables, family bridge, that knows the lab's addresses only; needs root.
    """
    lab.cut(project().resolve(), host, between.split(",") if between else (), only, one_way)
    report.result(f"cut: {'; '.join(lab.status(project().resolve()).cuts)}", good=True)


@door
def mend(c: Any) -> None:
    """Take all cuts back."""
    found = lab.mend(project().resolve())
    report.result(f"mended: {'; '.join(found)}" if found else "nothing was cut", good=True)


@door
def clock(c: Any, host: str = "", by: str = "0s") -> None:
    """Set a virtual host's clock: --by 2h ahead of this machine's, --by=-2h behind; without, right again."""
    sign, text = (-1, by[1:]) if by.startswith("-") else (1, by)
    lab.clock(project().resolve(), host, sign * (0 if text in ("0", "0s") else duration("by", text)))
    report.result(f"the clock of {host} is {by} ahead" if text not in ("0", "0s") else f"the clock of {host} is right")


@door
def module(c: Any, host: str = "", forbid: str = "") -> None:
    """Keep a virtual host's kernel from loading modules: --forbid esp4,gcm; without, it may load all again."""
    names = [name for name in forbid.split(",") if name]
    lab.modules(project().resolve(), host, names)
    report.result(f"{host} loads no {', '.join(names)}" if names else f"{host} loads what it needs", good=True)
