"""Accounts: kept on the mail volume, so that they move with the mail; the MTA gets the list of addresses.

The MTA needs its own list to answer an unknown recipient with 550 at once (no backscatter) and to accept a known
one while the MDA is away. A script in each image does the work inside; labels of the stack file may name others:
``swarmmail.users-command`` (list | add | passwd | remove ADDRESS) and ``swarmmail.recipients-command``.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence

import tenacity

from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import services
from swarmmail.mail.services import Container, Seen
from swarmmail.model.errors import HostError, SwarmmailError

USERS = ("swarmmail.users-command", "/usr/local/bin/swarmmail-users")
RECIPIENTS = ("swarmmail.recipients-command", "/usr/local/bin/swarmmail-recipients")


class Accounts:
    """The accounts of a running stack, as it was ``seen``. Raises HostError with the script's own line when it
    refuses."""

    def __init__(self, fleet: Fleet, seen: Seen | None = None) -> None:
        seen = services.observe(fleet) if seen is None else seen
        self._fleet = fleet
        self._find(seen)

    def _find(self, seen: services.Seen) -> None:
        self.mda: Container = services.running(self._fleet, seen, "mda")
        self.mta: Container = services.running(self._fleet, seen, "mta")
        self.seen = seen

    def _users(self, *words: str, stdin: str = "", step: str) -> str:
        command = self.mda.labels.get(*USERS)
        return self.mda.call(command, *words, stdin=stdin, step=step)

    def list(self) -> list[str]:
        return self._users("list", step="list accounts").split()

    def add(self, address: str, password: str, tell: bool = True) -> None:
        """``password`` travels by standard input only, and is hashed in the container. ``tell``: the MTA, too."""
        self._change("add", address, stdin=password + "\n", step=f"add {address}", tell=tell)

    def _change(self, *words: str, stdin: str = "", step: str, tell: bool = True) -> None:
        """Change, list and tell the MTA. The first two are one command: what starts a process in a container takes
        longer than the process."""
        command = self.mda.labels.get(*USERS)
        script = '$0 "$@" >&2 && exec $0 list'  # of several words, perhaps
        try:
            addresses = self.mda.call("sh", "-c", script, command, *words, stdin=stdin, step=step).split()
        except HostError:
            self.sync()  # it is there already, say: a run that was killed in between is completed by this one
            raise
        if tell:
            self._tell(addresses)

    def passwd(self, address: str, password: str) -> None:
        self._users("passwd", address, stdin=password + "\n", step=f"change the password of {address}")

    def remove(self, address: str, mail: bool = False) -> None:
        """Remove an account; its mailbox only with ``mail``."""
        self._change("remove", address, *(["--mail"] if mail else []), step=f"remove {address}")

    @contextlib.contextmanager
    def temporary(self, address: str, moves: bool = False, tell: bool = True) -> Iterator[str]:
        """An account that exists only meanwhile; yields its password. What a killed run left of it is removed first.

        ``moves``: services may move meanwhile, so at the end they are looked for anew. ``tell``: the MTA is told, which
        is of no use to who speaks LMTP.
        """
        password = secrets.token_urlsafe(24)
        try:
            self.add(address, password, tell)
        except HostError:
            if address not in self.list():
                raise
            self.remove(address, mail=True)
            self.add(address, password, tell)
        try:
            yield password
        finally:
            (Accounts(self._fleet) if moves else self).remove(address, mail=True)

    def sync(self, patience: float = 0) -> None:
        """Give the MTA the list of recipients. Run again, it repairs a list that is behind.

        ``patience``: seconds for which a failure is tried again. A container without a health check counts as
        running before its programs do, and may have been replaced when they do.
        """
        tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(HostError),
            stop=tenacity.stop_after_delay(patience),
            wait=tenacity.wait_fixed(0.5),
            before_sleep=lambda _: self._find_again(),
            reraise=True,
        )(self._sync)

    def _find_again(self) -> None:
        with contextlib.suppress(SwarmmailError):  # not yet
            self._find(services.observe(self._fleet, self.seen.observed))

    def _sync(self) -> None:
        self._tell(self.list())

    def _tell(self, addresses: Sequence[str]) -> None:
        text = "".join(f"{address}\n" for address in addresses) or "\n"  # never an empty input, see Container
        command = self.mta.labels.get(*RECIPIENTS)
        self.mta.call(command, stdin=text, step="tell the MTA its recipients")
