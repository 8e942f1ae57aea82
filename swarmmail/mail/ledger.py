"""``fab ledger.run``: mail at a known rate through the running stack, each one accounted for."""

from __future__ import annotations

import imaplib
import re
import secrets
import smtplib
import threading
import time

from swarmmail import report
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import probe, services
from swarmmail.mail.accounts import Accounts
from swarmmail.model.errors import HostError, InputError
from swarmmail.model.ledger import Ledger, Verdict
from swarmmail.model.stack import StackFile

USER = "swarmmail-ledger"
SENDERS = 4
PATIENCE = 120  # seconds for the queue to be empty when all is sent


def run(fleet: Fleet, stack: StackFile, rate: float, seconds: float) -> Verdict:
    """Send for some seconds, wait for the queue, count what IMAP shows. The account exists only meanwhile.

    A move of the MDA may go on at the same time; the MTA stays where it is.
    """
    address = probe.address(fleet.inventory, USER)
    if address is None:
        raise InputError([f"{fleet.inventory.path}: stack.settings.MAIL_DOMAIN: missing; the ledger needs an address"])
    accounts = Accounts(fleet)
    ledger, name = Ledger(), secrets.token_hex(4)
    with accounts.temporary(address, moves=True) as password:
        mta = accounts.mta.host
        with mta.forward(mta.spec.advertise, 25) as port:
            until = time.monotonic() + seconds
            threads = [
                threading.Thread(target=_send, args=(ledger, name, number, port, address, rate, until), daemon=True)
                for number in range(SENDERS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(seconds + 60)
        report.progress(f"{len(ledger.entries)} mails sent, waiting for the queue")
        _drained(accounts)
        return ledger.judge(_found(fleet, stack, address, password, name))


def _send(ledger: Ledger, name: str, worker: int, port: int, address: str, rate: float, until: float) -> None:
    client: smtplib.SMTP | None = None
    number, began = worker, time.monotonic()
    while (due := began + number / rate) < until:
        time.sleep(max(0.0, due - time.monotonic()))
        token = f"{name}-{number}"
        number += SENDERS
        ledger.attempt(token, time.time())
        try:
            client = client or smtplib.SMTP("127.0.0.1", port, probe.HELO, timeout=30)
        except (OSError, smtplib.SMTPException):
            ledger.refuse(token)
            continue
        try:
            client.sendmail("", [address], f"From: <{address}>\r\nTo: <{address}>\r\nSubject: {token}\r\n\r\nx\r\n")
            ledger.acknowledge(token, time.time())
        except (smtplib.SMTPServerDisconnected, OSError):
            client = None  # whether it was taken is not known
        except smtplib.SMTPException:
            ledger.refuse(token)
            client.close()
            client = None


def _drained(accounts: Accounts) -> None:
    """Wait until none of these mails is in the queue any more. Raises HostError when that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        listed = accounts.mta.exec("postqueue -j", step="read the queue").stdout
        if USER not in listed:
            return
        time.sleep(0.5)
    raise HostError(
        f"mail for {USER} is in the queue after {PATIENCE} s",
        host=accounts.mta.host.name,
        step="ledger",
        hint="see docs/runbooks/mail-stuck-in-the-queue.md",
    )


def _found(fleet: Fleet, stack: StackFile, address: str, password: str, name: str) -> list[str]:
    role, imap = probe.door(stack)
    host = services.running(fleet, services.observe(fleet), role).host
    with host.forward(host.spec.advertise, imap) as port:
        try:
            client = probe.login(fleet, host.name, port, imap == 993, address, password)
            client.select("INBOX", readonly=True)
            _, data = client.fetch("1:*", "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
            client.logout()
        except (imaplib.IMAP4.error, OSError, EOFError) as error:
            raise HostError(f"IMAP: {error}", host=host.name, step="ledger", hint="see: fab status") from None
    texts = b"".join(part[1] for part in data if isinstance(part, tuple)).decode("ascii", "replace")
    return re.findall(rf"Subject: ({name}-\d+)", texts)
