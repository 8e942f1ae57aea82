"""Moving a service, with its data if it has any."""

from __future__ import annotations

from typing import Any

from invoke import Collection

from swarmmail import report
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import ledger, services
from swarmmail.model import stack
from swarmmail.model.errors import InputError
from swarmmail.move import run as move
from swarmmail.tasks import verify
from swarmmail.tasks.door import door, dry, fleet
from swarmmail.tasks.door import status as end


def _end(hosts: Fleet, done: move.Done, times: bool, no_verify: bool) -> None:
    if times:
        report.table("", ["step", "seconds"], [(name, f"{seconds:.2f}") for name, seconds in done.times.steps])
    for line in done.lines:
        report.result(line)
    gap = f"; it was away {done.gap:.2f} s" if done.gap is not None else ""
    report.result(f"migrate: {done.move.service} is on {done.move.target}{gap}", good=True)
    try:
        verify.at_the_end(hosts, no_verify)
    except BaseException:
        if done.failure is not None:
            report.warning(str(done.failure))
        raise
    if done.failure is not None:
        raise done.failure


@door
def migrate(
    c: Any,
    service: str,
    to: str,
    inventory: str | None = None,
    plan: bool = False,
    check_only: bool = False,
    times: bool = False,
    bwlimit: str = "0",
    source_is_dead: bool = False,
    yes: bool = False,
    no_verify: bool = False,
) -> None:
    """Move a service to another host, with its data if it has any; no mail is lost.

    Changes: a copy of its volumes on the target, which becomes the live one; the old copy stays, marked stale, until
    migrate.purge. A service without data (edge) answers on the target before it ends where it was. When the MTA or the
    edge has moved, stack.address_hook is run. Killed anywhere, the same command finishes the move, or undoes it and
    begins again.
    --source-is-dead makes an older copy on the target the live one, when the source is lost for good; it needs --yes.
    --check-only looks whether it can be done; --plan shows the steps too; --times prints the seconds of each step.
    """
    hosts = fleet(c, inventory)
    if dry(c, plan) or check_only:
        found = move.check(hosts, services.observe(hosts), service, to)
        if found.move.source == to:
            report.result(f"migrate: {found.move.service} is on {to} already, nothing to do")
            return
        if not check_only:
            move.show(found)
        move.refuse(found)
        report.result(f"migrate: {found.move.text} can be done", good=True)
        return
    done = move.migrate(hosts, service, to, move.Options(source_is_dead, yes, bwlimit))
    if done is None:
        report.result(f"migrate: {service} is on {to} already, nothing to do")
    else:
        _end(hosts, done, times, no_verify)


@door
def status(c: Any, inventory: str | None = None) -> None:
    """Say whether a move is under way or was interrupted, and what to do. Changes nothing."""
    for line in move.status(fleet(c, inventory)):
        report.result(line)


@door
def resume(c: Any, inventory: str | None = None, times: bool = False, no_verify: bool = False) -> None:
    """Go on with a move that was interrupted: finish it, or undo it and begin again, as its journal says."""
    hosts = fleet(c, inventory)
    done = move.resume(hosts)
    if done is None:
        report.result("migrate: no move is under way, nothing to do")
    else:
        _end(hosts, done, times, no_verify)


@door
def abort(c: Any, inventory: str | None = None) -> None:
    """Undo a move that was interrupted, until its cutover: the service serves where it was. The copy stays, stale."""
    undone = move.abort(fleet(c, inventory))
    if undone is None:
        report.result("migrate: no move is under way, nothing to do")
    else:
        report.result(f"migrate: undone, {undone.service} is on {undone.source}", good=True)


@door
def purge(c: Any, inventory: str | None = None, plan: bool = False) -> None:
    """Remove the old copies that moves have left. --plan only shows them.

    Changes: volumes marked stale are deleted for good.
    """
    only = dry(c, plan)
    lines = move.purge(fleet(c, inventory), only)
    for line in lines:
        report.result(f"{'+ remove' if only else 'removed'} {line}")
    if not lines:
        report.result("migrate.purge: nothing to do")


@door
def ledger_run(c: Any, inventory: str | None = None, rate: str = "5", seconds: str = "10") -> None:
    """Send mail at a rate for some seconds, and account for each. Exit status 1 if one was lost or came from nowhere.

    Changes: makes the account swarmmail-ledger and removes it again, with its mailbox. Run it beside a migrate.
    """
    if not (rate.isdigit() and seconds.isdigit() and int(rate) and int(seconds)):
        raise InputError([f"--rate, --seconds: found '{rate}', '{seconds}', allowed: numbers above 0"])
    hosts = fleet(c, inventory)
    verdict = ledger.run(hosts, stack.read(hosts.inventory), float(rate), float(seconds))
    report.result(f"ledger: {verdict}", good=verdict.is_clean)
    if not verdict.is_clean:
        end(1)


books = Collection("ledger")
books.add_task(ledger_run, name="run")
moves = Collection("migrate")
moves.add_task(migrate, name="migrate", default=True)
for _task, _name in ((status, "status"), (resume, "resume"), (abort, "abort"), (purge, "purge")):
    moves.add_task(_task, name=_name)
