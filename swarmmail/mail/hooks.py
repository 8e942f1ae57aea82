"""What the mail stack knows about its services when one of them is moved. A service without a role gets ``Plain``."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tenacity

from swarmmail import report
from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import probe, services
from swarmmail.mail.accounts import Accounts
from swarmmail.mail.services import Container
from swarmmail.model.errors import HostError, Refused, SwarmmailError
from swarmmail.model.patience import patient
from swarmmail.model.stack import StackFile

GREETING = 20  # seconds for a service that was started to answer
STUCK = 60  # seconds without progress after which what was held counts as stuck
ADDRESS_LIMIT = patient(60)  # seconds for the address hook


class Hooks(Protocol):
    """Around the acts of a move. Each may be called twice."""

    live_copy: bool
    """Whether the volumes may be copied while the service runs, as a base for the last pass."""
    port: int | None
    """A port (TCP, in the container) whose connections must have ended before the service is stopped."""
    also: str
    """Files of this name are compared by content, wherever they are."""
    address_hook: Path | None
    """The operator's program that lets the public address follow; None: there is none, or no public address."""

    def before(self, target: Host) -> list[str]:
        """What people must know or do; said before anything is done."""

    def ready(self) -> None:
        """Look for all that is needed, before it is urgent."""

    def hold(self) -> None:
        """Let what is for the service wait."""

    def release(self) -> None: ...
    def answers(self, host: Host, pid: int) -> None:
        """Raises HostError unless the service on ``host``, first process ``pid``, answers those who need it."""

    def follow(self, source: Host, target: Host) -> None:
        """Run the address hook, if there is one. Raises HostError when it fails."""

    def after(self) -> list[str]:
        """What there is to see when all is done; lines for people."""


class Plain:
    """Any service: stopped, copied, started. It answers when its own health check says so."""

    live_copy = True
    port: int | None = None
    also = "\\"
    address_hook: Path | None = None

    def __init__(self, fleet: Fleet, stack: StackFile) -> None:
        self.fleet, self.stack = fleet, stack

    def before(self, target: Host) -> list[str]:
        return []

    def ready(self) -> None: ...

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def answers(self, host: Host, pid: int) -> None: ...

    def follow(self, source: Host, target: Host) -> None: ...

    def after(self) -> list[str]:
        return []


_HOLD = """
main=$(postconf -h config_directory)/main.cf
now=$(postconf -h defer_transports)
[ "$now" = "$1" ] && { [ -n "$1" ] || postfix reload >/dev/null 2>&1; exit 0; }
queue_manager() { for c in /proc/[0-9]*/comm; do [ "$(cat $c 2>/dev/null)" = qmgr ] && echo ${c%/comm}; done; }
old=$(queue_manager)
if [ -n "$1" ]; then postconf -e "defer_transports=$1"; else postconf -X defer_transports; fi
# every Postfix program waits until main.cf has not been changed for more than a second; nobody else changes it now
touch -d '1 minute ago' "$main"
postfix reload >/dev/null 2>&1 || exit 1
# the old queue manager may still hand out a delivery; the new one does not
i=0
while [ -n "$old" ] && [ -e "$old" ] && [ $i -lt 300 ]; do sleep 0.01; i=$((i + 1)); done
[ -z "$old" ] || [ ! -e "$old" ]
"""


_EDGE = """
exec 3<>/dev/tcp/127.0.0.1/9999
servers=$(echo 'show servers state' >&3; cat <&3)
words=$(echo "$servers" | while read -r _ backend _ server _; do
    case $backend/$server in mda_*/mda*) printf 'set server %s/%s state %s;' "$backend" "$server" "$1" ;; esac
done)
exec 3<>/dev/tcp/127.0.0.1/9999
echo "$words" >&3
cat <&3
"""
# Connections by the edge (ports 10143 and 10993 as in /proc/net/tcp, state 01 is ESTABLISHED) that have not logged in
# are those of which `doveadm who` knows nothing.
_YOUNG = """
i=0
while [ $i -lt 20 ]; do
    open=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -c ':\\(279F\\|2AF1\\) [0-9A-F]*:[0-9A-F]* 01 ')
    [ "$open" -gt "$(doveadm who -1 2>/dev/null | grep -cw imap)" ] || exit 0
    i=$((i + 1))
    sleep 0.03
done
"""


class Mda(Plain):
    """Deliveries wait in the MTA's queue, as deferred, without an attempt: LMTP goes straight from MTA to MDA.

    New IMAP connections wait at the edge, if there is one.
    """

    port = 24
    also = "dovecot-uidlist"

    def __init__(self, fleet: Fleet, stack: StackFile) -> None:
        super().__init__(fleet, stack)
        self._found: dict[str, tuple[Container, int]] = {}

    def _inside(
        self, script: str, *words: str, step: str, timeout: float = 30, role: str = "mta", program: str = "sh"
    ) -> str:
        """Run a script inside a container of the stack, as ``docker exec`` would, in a tenth of its time."""
        arguments = " ".join(map(shlex.quote, words))

        def run() -> str:
            container, pid = self._find(role)
            command = f"nsenter -t {pid} -m -u -i -n -p -- {program} -s {arguments}"
            return container.host.run(command, stdin=script, step=step, timeout=timeout).stdout

        try:
            return run()
        except HostError as error:
            if not error.what.startswith("nsenter:"):
                raise
            del self._found[role]  # its container has been replaced since it was found
            return run()

    def _find(self, role: str) -> tuple[Container, int]:
        if role not in self._found:
            found = services.running(self.fleet, services.observe(self.fleet), role)
            with found.host.doing(f"find the {role}"):
                self._found[role] = found, found.host.docker.inspect_container(found.id)["State"]["Pid"]
        return self._found[role]

    def ready(self) -> None:
        for role in ("mta", "edge", "mda"):
            with contextlib.suppress(Refused):
                self._find(role)

    def hold(self) -> None:
        if self._edge("maint") and "mda" in self._found:
            # who is about to log in is let in, and so is sent away with a BYE, not cut; nobody is waited for long
            self._inside(_YOUNG, step="let young sessions log in", role="mda")
        self._inside(_HOLD, "lmtp", step="hold the deliveries")

    def _edge(self, state: str) -> bool:
        """Let new IMAP connections wait (``maint``), or go on (``ready``); False when there is no edge."""
        if self.stack.by_role("edge") is None:
            return False
        try:
            self._inside(_EDGE, state, step=f"edge: {state}", role="edge", program="bash")
        except Refused as error:
            report.warning(f"{error}; IMAP connections are refused meanwhile")
            return False
        return True

    def release(self) -> None:
        """Also where nothing is held: a delivery to a host that lost its power hangs for 120 s
        (``lmtp_data_done_timeout``), and the mails behind it wait; a new queue manager does not know of it."""
        self._edge("ready")
        try:
            self._inside(_HOLD, "", step="release the deliveries")
            self._inside("postqueue -f", step="flush the queue")
        except Refused as error:
            report.warning(f"{error}; an MTA that starts holds nothing")

    def answers(self, host: Host, pid: int) -> None:
        """LMTP greets, seen from the MTA's own network, by name: that is the way of every delivery."""
        service = self.stack.by_role("mda")
        name = service.name if service is not None else "mda"
        # The loop is in there: from here each try would cost a round trip. A try has an end: for some moments the
        # name may still lead to the container that has just gone, and a connection to it hangs.
        greet = (
            f"exec 3<>/dev/tcp/{name}/24 && read -r line <&3 && "
            '[ "${line#220}" != "$line" ] && echo "$line" && echo QUIT >&3'
        )
        script = (
            f"limit=0.3; while [ $SECONDS -lt {GREETING} ]; do "
            f"timeout $limit bash -c {shlex.quote(greet)} 2>/dev/null && exit; "
            "[ $SECONDS -lt 2 ] || limit=3; sleep 0.02; done; exit 1"
        )

        def greeted() -> str:
            return self._inside(script, step="LMTP from the MTA", timeout=2 * GREETING, program="bash")

        line = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(HostError),
            stop=tenacity.stop_after_delay(GREETING),
            wait=tenacity.wait_fixed(0.02),
            retry_error_callback=lambda state: "",
        )(greeted)
        if not line.startswith("220"):
            raise HostError(
                f"no LMTP greeting within {GREETING} s, asked from the MTA's network for {name}:24",
                host=host.name,
                step="serve",
                hint="see: fab status",
            )

    def _queue(self) -> list[dict[str, Any]]:
        listed = self._inside("postqueue -j", step="read the queue")
        return [json.loads(line) for line in listed.splitlines() if line.strip()]

    def after(self) -> list[str]:
        began = time.monotonic()
        old = time.time()

        def waiting() -> list[dict[str, Any]]:
            return [mail for mail in self._queue() if mail["arrival_time"] < old]

        least, since = len(waiting()), time.monotonic()
        while least:
            if time.monotonic() - since < STUCK:
                time.sleep(0.2)
                if (now := len(waiting())) < least:
                    least, since = now, time.monotonic()
                continue
            raise SwarmmailError(
                f"{least} mails that were held are in the queue, and none has gone for {STUCK} s",
                step="after",
                hint="see docs/runbooks/mail-stuck-in-the-queue.md",
            )
        lines = [f"what was held has arrived, {time.monotonic() - began:.1f} s after the release"]
        accounts = Accounts(self.fleet)
        accounts.sync(patience=20)
        return [*lines, str(probe.run(self.fleet, self.stack, accounts=accounts))]


def last_words(words: Sequence[str], limit: float) -> str:
    """Run a program of the operator's, with no input: why it failed, by its own last line; empty when it did not.

    Args:
        limit: seconds; then it is ended, with all that it has started.
    """
    with tempfile.TemporaryFile() as said:  # no pipe: what it leaves running may keep the other end open
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"can't be run: {error.strerror}"
        try:
            status = process.wait(limit)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"took longer than {limit:g} s and was ended"
            raise
        said.seek(0)
        lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    if status == 0:
        return ""
    last = "".join(char for char in lines[-1] if char.isprintable()) if lines else "no message"
    return f"exit status {status}: {last}"


class Public(Plain):
    """What the world connects to. When it has moved, its public address has to follow."""

    role: str
    meanwhile: str
    """What becomes of those who connect before the address has followed."""

    def __init__(self, fleet: Fleet, stack: StackFile) -> None:
        super().__init__(fleet, stack)
        assert fleet.inventory.stack is not None
        self.address_hook = fleet.inventory.stack.address_hook

    def name(self) -> str:
        """The name by which the world finds it."""
        raise NotImplementedError

    def before(self, target: Host) -> list[str]:
        address = target.spec.address
        how = (
            f"{self.address_hook} will be run to make {self.name()} lead to {address}"
            if self.address_hook is not None
            else f"make {self.name()} lead to {address} (DNS, its TTL made short some time before; or move the "
            "floating address)"
        )
        return [f"the public address moves, too: {how}. {self.meanwhile}"]

    def follow(self, source: Host, target: Host) -> None:
        if self.address_hook is None:
            return
        told = (self.role, source.name, target.name, source.spec.address, target.spec.address)
        words = (str(self.address_hook), *told)
        by_hand = f"make {self.name()} lead to {target.spec.address} by hand"
        if why := last_words(words, ADDRESS_LIMIT):
            raise HostError(
                f"{self.address_hook.name}: {why}",
                host=target.name,
                step="address hook",
                hint=f"{by_hand}, or mend it and run: {shlex.join(words)}",
            )
        report.progress(f"address hook: {shlex.join(told)}", target.name)


class Mta(Public):
    """Its queue is not copied while it runs: a mail would be in two. Others try again while port 25 refuses."""

    live_copy = False
    role = "mta"
    meanwhile = "Senders that find nobody try again"

    def name(self) -> str:
        assert self.fleet.inventory.stack is not None
        return self.fleet.inventory.stack.settings.get("MAIL_HOSTNAME", "the name of the MX record")

    def answers(self, host: Host, pid: int) -> None:
        script = 'exec 3<>/dev/tcp/127.0.0.1/25 && read -r -t 5 line <&3 && echo "$line" && echo QUIT >&3'
        command = f"nsenter -t {pid} -m -u -i -n -p -- bash -c {shlex.quote(script)}"
        result = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda result: not result.stdout.startswith("220")),
            stop=tenacity.stop_after_delay(GREETING),
            wait=tenacity.wait_fixed(0.02),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )(lambda: host.run(command, step="SMTP greeting", timeout=10, check=False))
        if not result.stdout.startswith("220"):
            raise HostError(
                f"no SMTP greeting within {GREETING} s", host=host.name, step="serve", hint="see: fab status"
            )

    def after(self) -> list[str]:
        seen = services.observe(self.fleet)
        services.running(self.fleet, seen, "mta").exec("postqueue -f", step="flush the queue")
        accounts = Accounts(self.fleet, seen)
        accounts.sync(patience=20)
        host, address = accounts.mta.host, accounts.mta.host.spec.address
        return [
            str(probe.run(self.fleet, self.stack, accounts=accounts)),
            f"mail is taken at {host.name} ({address}) now: the world must find it there (MX, floating address)",
        ]


class Edge(Public):
    """People's mail programs connect to it. It has no data, so it answers on both hosts until the move is over."""

    role = "edge"
    meanwhile = "Mail programs that were connected to the old one connect anew"

    def name(self) -> str:
        return "the name that mail programs use"

    def answers(self, host: Host, pid: int) -> None:
        probe.imap_greets(self.fleet, self.stack, host)

    def after(self) -> list[str]:
        seen = services.observe(self.fleet)
        host = services.running(self.fleet, seen, "edge").host
        accounts = Accounts(self.fleet, seen)
        return [
            str(probe.run(self.fleet, self.stack, accounts=accounts)),
            f"people read their mail at {host.name} ({host.spec.address}) now: mail programs must find it there "
            "(DNS, floating address)",
        ]


def of(fleet: Fleet, stack: StackFile, role: str) -> Hooks:
    return {"mda": Mda, "mta": Mta, "edge": Edge}.get(role, Plain)(fleet, stack)
