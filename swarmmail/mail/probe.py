"""The end-to-end probe: a mail with a random token goes in by SMTP and is read back by IMAP.

Both sides are reached by the hosts' own published ports, through the SSH connection. Both must show the very
certificate that was deployed. The probe's account exists only while it runs.
"""

from __future__ import annotations

import imaplib
import secrets
import smtplib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from swarmmail import report
from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import services
from swarmmail.mail.accounts import Accounts
from swarmmail.mail.services import Container
from swarmmail.model.errors import HostError, InputError, SwarmmailError
from swarmmail.model.inventory import Inventory
from swarmmail.model.patience import patient
from swarmmail.model.stack import StackFile

USER = "swarmmail-probe"
LIMIT = patient(30)  # seconds from 250 to the mailbox
AGAIN = 5  # seconds
HELO = "probe.swarmmail.invalid"
T = TypeVar("T")
TIMEOUT = patient(15)  # seconds for one answer


@dataclass(frozen=True)
class Outcome:
    """What the probe saw. Times in seconds."""

    token: str
    mta: str
    mda: str
    accepted: float
    delivered: float

    def __str__(self) -> str:
        return (
            f"mail taken by {self.mta} (SMTP) and read back from {self.mda} (IMAP) "
            f"{self.delivered:.2f} s after it was accepted"
        )


def _context() -> ssl.SSLContext:
    """TLS without a certificate authority: the certificate is compared with the deployed one instead."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def run(fleet: Fleet, stack: StackFile, token: str | None = None, accounts: Accounts | None = None) -> Outcome:
    """Send and read back one mail. ``accounts``: of the stack as it was seen a moment ago; without, it is looked at.

    Raises:
        SwarmmailError: which side failed, and how.
    """
    recipient = address(fleet.inventory)
    if recipient is None:
        raise InputError(
            [f"{fleet.inventory.path}: stack.settings.MAIL_DOMAIN: missing; the probe needs an address in it"]
        )
    accounts = Accounts(fleet) if accounts is None else accounts
    token = secrets.token_hex(16) if token is None else token
    with accounts.temporary(recipient) as password:
        return _send_and_read(fleet, stack, accounts, recipient, password, token)


def address(inventory: Inventory, user: str = USER) -> str | None:
    """The probe's address, in the first domain of the stack; None when its settings name none."""
    domain = inventory.stack.settings.get("MAIL_DOMAIN", "").split() if inventory.stack is not None else []
    return f"{user}@{domain[0].rstrip(',')}" if domain else None


def door(stack: StackFile) -> tuple[str, int]:
    """Where people read their mail: the role of the service, and its port (993, or 143 with STARTTLS)."""
    role = "edge" if stack.by_role("edge") is not None else "mda"
    service = stack.by_role(role)
    return role, 993 if service is not None and 993 in service.ports else 143


def _send_and_read(
    fleet: Fleet, stack: StackFile, accounts: Accounts, address: str, password: str, token: str
) -> Outcome:
    mta, mda = accounts.mta.host, accounts.mda.host
    role, imap = door(stack)
    shown = services.running(fleet, accounts.seen, role).host if role == "edge" else mda
    by = f" by the edge on {shown.name}" if role == "edge" else ""
    report.progress(f"probe: SMTP to {mta.name}, IMAP from {mda.name}{by}")
    with mta.forward(mta.spec.advertise, 25) as port:
        _submit(fleet, mta.name, port, address, token)
    accepted = time.monotonic()
    with shown.forward(shown.spec.advertise, imap) as port:
        try:
            client = login(fleet, shown.name, port, imap == 993, address, password)
            try:
                _await(client, token, accounts.mta)
            finally:
                client.logout()
        except tenacity.RetryError:
            raise SwarmmailError(
                f"mail accepted by {mta.name} was not in the mailbox after {LIMIT:g} s",
                host=mda.name,
                step="probe",
                hint="see docs/runbooks/mail-stuck-in-the-queue.md",
            ) from None
        except (imaplib.IMAP4.error, OSError, EOFError) as error:
            raise HostError(f"IMAP: {error}", host=shown.name, step="probe", hint="see: fab status") from None
    return Outcome(token, mta.name, mda.name, accepted, time.monotonic() - accepted)


def _same_certificate(fleet: Fleet, host: str, shown: bytes | None) -> None:
    stack = fleet.inventory.stack
    if stack is None or stack.tls is None:
        return
    first = stack.tls.certificate.read_text().split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"
    if shown != ssl.PEM_cert_to_DER_cert(first[first.index("-----BEGIN") :]):
        raise HostError("shows another certificate than the deployed one", host=host, step="probe TLS")


def _patiently(connect: Callable[[], T]) -> T:
    """Connect; a container without a health check counts as running before its programs listen."""
    connection: T = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((OSError, smtplib.SMTPServerDisconnected, imaplib.IMAP4.abort)),
        stop=tenacity.stop_after_delay(TIMEOUT),
        wait=tenacity.wait_fixed(0.3),
        reraise=True,
    )(connect)
    return connection


def _submit(fleet: Fleet, host: str, port: int, address: str, token: str) -> None:
    message = (
        f"From: <{address}>\r\nTo: <{address}>\r\nSubject: swarmmail probe {token}\r\n"
        f"Message-ID: <{token}@probe.swarmmail>\r\nDate: {time.strftime('%a, %d %b %Y %H:%M:%S +0000', time.gmtime())}"
        f"\r\n\r\n{token}\r\n"
    )
    try:
        with _patiently(lambda: smtplib.SMTP("127.0.0.1", port, HELO, timeout=TIMEOUT)) as smtp:
            smtp.ehlo()
            if smtp.has_extn("starttls"):
                smtp.starttls(context=_context())
                sock = smtp.sock
                _same_certificate(fleet, host, sock.getpeercert(True) if isinstance(sock, ssl.SSLSocket) else None)
            smtp.sendmail("", [address], message)
    except (smtplib.SMTPException, OSError) as error:
        raise HostError(f"SMTP: {error}", host=host, step="probe", hint="see: fab status") from None


def greeted(fleet: Fleet, host: str, port: int, imaps: bool) -> imaplib.IMAP4:
    """A connection to ``port`` of this machine, which leads to ``host``: IMAP greets, with the deployed certificate.

    Raises:
        HostError: it shows another certificate.
        OSError, imaplib.IMAP4.error: it does not greet.
    """
    client: imaplib.IMAP4
    if imaps:
        client = _patiently(lambda: imaplib.IMAP4_SSL("127.0.0.1", port, ssl_context=_context(), timeout=TIMEOUT))
    else:
        client = _patiently(lambda: imaplib.IMAP4("127.0.0.1", port, timeout=TIMEOUT))
        client.starttls(_context())
    sock = client.socket()
    _same_certificate(fleet, host, sock.getpeercert(True) if isinstance(sock, ssl.SSLSocket) else None)
    return client


def imap_greets(fleet: Fleet, stack: StackFile, host: Host) -> None:
    """Raises HostError unless IMAP greets where people come to a host."""
    _, port = door(stack)
    try:
        with host.forward(host.spec.advertise, port) as local:
            greeted(fleet, host.name, local, port == 993).logout()
    except (imaplib.IMAP4.error, OSError, EOFError) as error:
        raise HostError(
            f"no IMAP greeting at port {port}: {error or type(error).__name__}",
            host=host.name,
            step="serve",
            hint="see: fab status",
        ) from None


def login(fleet: Fleet, host: str, port: int, imaps: bool, address: str, password: str) -> imaplib.IMAP4:
    client = greeted(fleet, host, port, imaps)
    client.login(address, password)
    return client


def _await(client: imaplib.IMAP4, token: str, mta: Container) -> None:
    """Poll the mailbox until the token is there, then remove the mail. Raises tenacity.RetryError.

    An MTA that tried while the MDA was starting waits a minute: it is asked to try again.
    """
    asked = time.monotonic()

    def look() -> list[bytes]:
        nonlocal asked
        if time.monotonic() - asked > AGAIN:
            asked = time.monotonic()
            mta.exec("postqueue -f", step="flush the queue", check=False)
        client.select("INBOX")
        found: list[bytes] = client.search(None, "SUBJECT", token)[1][0].split()
        return found

    found = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda numbers: not numbers),
        stop=tenacity.stop_after_delay(LIMIT),
        wait=tenacity.wait_fixed(0.1),
    )(look)
    body = client.fetch(found[0].decode(), "(BODY[TEXT])")[1][0]
    if not isinstance(body, tuple) or token.encode() not in body[1]:
        raise imaplib.IMAP4.error("the mail came without its token")
    client.store(found[0].decode(), "+FLAGS", "\\Deleted")
    client.expunge()
