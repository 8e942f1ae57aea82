"""Doors of the lab."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from swarmmail import lab, report
from swarmmail.model.errors import InputError
from swarmmail.tasks.door import door, project


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
