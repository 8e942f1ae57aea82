"""The mail stack: deploy, status, probe, accounts, queue."""

from __future__ import annotations

import getpass
import sys
from typing import Any

from invoke import Collection

from swarmmail import report
from swarmmail.mail import accounts, probe, services
from swarmmail.mail import deploy as stack
from swarmmail.mail import status as state
from swarmmail.model import stack as model
from swarmmail.model.errors import InputError
from swarmmail.tasks import verify
from swarmmail.tasks.door import door, dry, fleet


@door
def deploy(
    c: Any, inventory: str | None = None, plan: bool = False, no_probe: bool = False, no_verify: bool = False
) -> None:
    """Deploy the mail stack, wait until what was asked runs, send a mail through it, and prove the encryption.

    Changes: images on the hosts, volumes on their first host, configs, secrets and services of the stack. Never
    moves a service that is bound to a host. --plan only shows the difference. --no-probe leaves the test mail out,
    --no-verify the proof.
    """
    hosts = fleet(c, inventory)
    if dry(c, plan):
        found = stack.decide(hosts, stack.check(hosts.inventory))
        stack.show(found)
        if found.is_empty:
            report.result("deploy: nothing to do")
    elif (seen := stack.run(hosts)) is None:
        report.result("deploy: nothing to do")
    else:
        known = accounts.Accounts(hosts, seen)
        known.sync(patience=20)
        if no_probe:
            report.result("deploy: all services run what was asked (the probe mail was left out)", good=True)
        else:
            report.result(f"deploy: {probe.run(hosts, model.read(hosts.inventory), accounts=known)}", good=True)
        verify.at_the_end(hosts, no_verify)


@door
def status(c: Any, inventory: str | None = None, json: bool = False) -> None:
    """Show nodes, services, volumes and queue on one screen. Changes nothing."""
    found = state.collect(fleet(c, inventory))
    if json:
        report.document(found)
    else:
        state.show(found)


@door
def send_probe(c: Any, inventory: str | None = None) -> None:
    """Send a mail with a random token by SMTP and read it back by IMAP.

    Changes: makes the account swarmmail-probe and removes it again, with its mailbox.
    """
    hosts = fleet(c, inventory)
    report.result(f"probe: {probe.run(hosts, model.read(hosts.inventory))}", good=True)


def _password(address: str) -> str:
    """Ask on the terminal, twice; without one, read a line from standard input."""
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = getpass.getpass(f"Password for {address}: ")
        if getpass.getpass("Again: ") != password:
            raise InputError(["the two passwords differ; nothing was changed"])
    if not password:
        raise InputError(["no password was given (terminal or standard input); nothing was changed"])
    return password


@door
def user_add(c: Any, address: str, inventory: str | None = None) -> None:
    """Add a mail account; the password is asked, or read from standard input.

    Changes: the list of users on the mail volume and the MTA's list of recipients. No restart.
    """
    password = _password(address)
    accounts.Accounts(fleet(c, inventory)).add(address, password)
    report.result(f"account {address} added", good=True)


@door
def user_passwd(c: Any, address: str, inventory: str | None = None) -> None:
    """Change the password of an account; it is asked, or read from standard input. No restart."""
    password = _password(address)
    accounts.Accounts(fleet(c, inventory)).passwd(address, password)
    report.result(f"password of {address} changed", good=True)


@door
def user_remove(c: Any, address: str, inventory: str | None = None, mail: bool = False) -> None:
    """Remove an account; the MTA refuses its mail at once. Its mailbox stays, unless --mail is given."""
    accounts.Accounts(fleet(c, inventory)).remove(address, mail)
    report.result(f"account {address} removed{' with its mail' if mail else '; its mailbox stays'}", good=True)


@door
def user_list(c: Any, inventory: str | None = None) -> None:
    """List the accounts. Changes nothing."""
    for address in accounts.Accounts(fleet(c, inventory)).list():
        report.result(address)


@door
def queue_list(c: Any, inventory: str | None = None) -> None:
    """Show the MTA's queue, as postqueue -p does. Changes nothing."""
    hosts = fleet(c, inventory)
    mta = services.running(hosts, services.observe(hosts), "mta")
    report.result(mta.exec("postqueue -p", step="read the queue").stdout.rstrip())


@door
def queue_flush(c: Any, inventory: str | None = None) -> None:
    """Try every queued mail again now (postqueue -f). Changes nothing else."""
    hosts = fleet(c, inventory)
    mta = services.running(hosts, services.observe(hosts), "mta")
    mta.exec("postqueue -f", step="flush the queue")
    report.result("the MTA tries its whole queue now; see: fab queue.list")


user = Collection("user")
for _task, _name in ((user_add, "add"), (user_passwd, "passwd"), (user_remove, "remove"), (user_list, "list")):
    user.add_task(_task, name=_name)
queue = Collection("queue")
for _task, _name in ((queue_list, "list"), (queue_flush, "flush")):
    queue.add_task(_task, name=_name)
