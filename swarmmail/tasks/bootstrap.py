"""Swarm and overlay: bootstrap, the plan of everything, and the lock."""

from __future__ import annotations

from typing import Any

from invoke import Collection

from swarmmail import report
from swarmmail.cluster import bootstrap as cluster
from swarmmail.mail import deploy
from swarmmail.tasks import verify
from swarmmail.tasks.door import door, dry, fleet, status


@door
def bootstrap(
    c: Any, inventory: str | None = None, plan: bool = False, no_check: bool = False, no_verify: bool = False
) -> None:
    """Make one Swarm of the hosts, with the encrypted overlay for LMTP.

    Changes: installs Docker (and WireGuard) where missing, joins the hosts, labels the nodes, creates the
    overlay. Run again, it repairs what is missing and leaves the rest. --plan only shows what it would do. Before
    a host becomes a member, `check` looks for what would be in the way (--no-check leaves it out); when something
    was changed and mail services run, the proof of encryption is the last step (--no-verify leaves it out).
    """
    hosts = fleet(c, inventory)
    if dry(c, plan):
        cluster.show(cluster.decide(hosts.inventory, cluster.observe(hosts))[1])
    elif cluster.run(hosts, preflight=not no_check):
        report.result(f"bootstrap: {hosts.inventory.cluster} is as the inventory wants it", good=True)
        verify.at_the_end(hosts, no_verify)
    else:
        report.result("bootstrap: nothing to do")


@door
def plan(c: Any, inventory: str | None = None) -> None:
    """Show what `bootstrap deploy` would do. Changes nothing. Exit status 0: nothing to do, 2: changes."""
    hosts = fleet(c, inventory)
    file = deploy.check(hosts.inventory) if hosts.inventory.stack is not None else None
    observed = cluster.observe(hosts)
    todo = cluster.decide(hosts.inventory, observed)[1]
    cluster.show(todo)
    if todo.steps:
        if file is not None:
            report.result(f"then: deploy stack {file.name} ({', '.join(file.services)})")
        status(2)
    if file is not None:
        found = deploy.decide(hosts, file, before=observed)
        deploy.show(found)
        if not found.is_empty:
            status(2)
    report.result("plan: nothing to do")


@door
def lock_status(c: Any, inventory: str | None = None) -> None:
    """Say who holds the lock, and since when. Changes nothing."""
    found = cluster.locks(fleet(c, inventory))
    for place, owner in found.items():
        report.result(f"{place}: {owner.text if owner else 'free'}")


@door
def lock_break(c: Any, inventory: str | None = None) -> None:
    """Take away the lock of a run that is dead for certain. Changes: the lock, nothing else."""
    hosts = fleet(c, inventory)
    for place, owner in cluster.locks(hosts).items():
        if owner is not None:
            report.result(f"{place}: released, it said: {owner.text}")
    cluster.break_locks(hosts)


lock = Collection("lock")
lock.add_task(lock_status, name="status")
lock.add_task(lock_break, name="break")
