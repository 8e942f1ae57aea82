"""A stream of mail at a known rate while something else happens, with a ledger; watchers of what must never happen."""

from __future__ import annotations

import contextlib
import imaplib
import itertools
import os
import random
import re
import smtplib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from conftest import HOSTS, SLOW, Project
from mailing import container, imap, queue, trusting

from swarmmail.model.ledger import GONE, Actions, Ledger, Verdict

SUBJECT = re.compile(rb"^Subject: (\S+)", re.M | re.I)


@dataclass
class Stream:
    """Sends until it is stopped. ``to`` are addresses with the password that ``judge`` reads them with."""

    project: Project
    to: Sequence[str]
    password: str
    rate: float = float(os.environ.get("SWARMMAIL_RATE", 20 if SLOW == 1 else 0.5))
    """Mails a second. A machine that is busy with other things bears less."""
    hosts: Sequence[str] = ("host1",)
    """Tried one after the other: where the MTA may be."""
    name: str = "m"
    ledger: Ledger = field(default_factory=Ledger)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Stream:
        workers = 4
        for worker in range(workers):
            thread = threading.Thread(target=self._work, args=(worker, workers), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, worker: int, workers: int) -> None:
        addresses = [self.project.address(host) for host in self.hosts]
        number, began = worker, time.monotonic()
        client: smtplib.SMTP | None = None
        while not self._stop.is_set():
            if self._stop.wait(max(0.0, began + number / self.rate - time.monotonic())):
                break
            token, to = f"{self.name}-{number}", self.to[number % len(self.to)]
            number += workers
            self.ledger.attempt(token, time.time())
            try:
                if client is None:
                    client = smtplib.SMTP(addresses[0], 25, local_hostname="stranger.example.com", timeout=20)
            except OSError:
                addresses.append(addresses.pop(0))
                self.ledger.refuse(token)
                continue
            try:
                client.sendmail(
                    "sender@example.com",
                    [to],
                    f"From: <sender@example.com>\r\nTo: <{to}>\r\nSubject: {token}\r\n\r\nx\r\n",
                )
                self.ledger.acknowledge(token, time.time())
            except (smtplib.SMTPServerDisconnected, OSError):
                client = None  # whether it was taken is not known
            except smtplib.SMTPException:
                self.ledger.refuse(token)
                with contextlib.suppress(Exception):
                    client.close()
                client = None
        with contextlib.suppress(Exception):
            if client is not None:
                client.quit()

    def judge(
        self, mda: str, mta: str = "host1", volume: str = "mail_mail", patience: float = 240, edge: str = "host1"
    ) -> Verdict:
        """Wait until the queue is empty, then count what IMAP shows; arrival times by the names of the files.

        A host that lost its power in the last moment of a delivery keeps Postfix waiting for 120 s
        (``lmtp_data_done_timeout``), and the mails behind that one, too.
        """
        deadline = time.monotonic() + patience
        while waiting := queue(self.project, mta):
            assert time.monotonic() < deadline, f"after {patience:g} s the queue still holds {waiting}"
            self.project.sh(mta, f"docker exec {container(self.project, mta, 'mail_mta')} postqueue -f", check=False)
            time.sleep(1)
        found: list[str] = []
        for address in self.to:
            with imap(self.project, address, self.password, edge) as client:
                client.select("INBOX", readonly=True)
                _, data = client.fetch("1:*", "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
                texts = [part[1] for part in data if isinstance(part, tuple)]
                found += [m[1].decode() for text in texts if (m := SUBJECT.search(text))]
        mine = [token for token in found if token.startswith(f"{self.name}-")]
        return self.ledger.judge(mine, arrived=self._arrived(mda, volume))

    def _arrived(self, mda: str, volume: str) -> dict[str, float]:
        """Dovecot's file names hold the moment of delivery: ``<seconds>.M<microseconds>P...``."""
        listed = self.project.sh(
            mda,
            f"cd /var/lib/docker/volumes/{volume}/_data && "
            "grep -rm1 --include='*.M*' '^Subject: ' . 2>/dev/null || true",
        )
        times = {}
        for line in listed.splitlines():
            if m := re.search(r"/(\d+)\.M(\d+)P[^:]*.*:Subject: (\S+)$", line):
                times[m[3]] = int(m[1]) + int(m[2]) / 1e6
        return times


INBOX, KEPT = "INBOX", "Kept"
FLAGGED = f"{INBOX} flagged"


@dataclass
class Clients:
    """IMAP clients at the edge that append, flag, move and expunge messages of their own until they are stopped.

    Half of them make a connection for each message, half keep theirs as long as it lasts.
    """

    project: Project
    to: Sequence[str]
    """Accounts that only these clients read."""
    password: str
    count: int = int(os.environ.get("SWARMMAIL_CLIENTS", "6"))
    edge: str = "host1"
    actions: Actions = field(default_factory=Actions)
    failed: list[str] = field(default_factory=list)
    """Connections that did not come to a login, with why."""
    cut: list[str] = field(default_factory=list)
    """Sessions that ended without a BYE."""
    logins: int = 0
    byes: int = 0
    longest: float = 0.0
    """Seconds from the connection to the login, the longest."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._address, self._context = self.project.address(self.edge), trusting(self.project)
        for address in self.to:
            with imap(self.project, address, self.password, self.edge) as client:
                client.create(KEPT)
        for worker in range(self.count):
            thread = threading.Thread(target=self._work, args=(worker,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)

    def _work(self, worker: int) -> None:
        rng, keeps = random.Random(worker), worker % 2  # noqa: S311
        client: imaplib.IMAP4 | None = None
        for number in itertools.count():
            if self._stop.wait(SLOW * rng.uniform(0.05, 0.4)):
                break
            client = client or self._login(self.to[worker % len(self.to)])
            if client is None:
                continue
            try:
                self._one(client, f"c{worker}-{number}", rng)
                if not keeps:
                    client.logout()
                    client = None
            except (imaplib.IMAP4.error, OSError) as error:
                if client.untagged_responses.get("BYE") or "BYE" in str(error):
                    self.byes += 1
                else:
                    self.cut.append(f"{time.time():.2f} {error!r}")
                client = None
        with contextlib.suppress(Exception):
            if client is not None:
                client.logout()

    def _login(self, address: str) -> imaplib.IMAP4 | None:
        began = time.monotonic()
        try:
            client = imaplib.IMAP4_SSL(self._address, 993, ssl_context=self._context, timeout=60)
            client.login(address, self.password)
            client.select(INBOX)
        except (imaplib.IMAP4.error, OSError) as error:
            self.failed.append(f"{time.time():.2f} after {time.monotonic() - began:.2f} s: {error!r}")
            return None
        self.logins += 1
        self.longest = max(self.longest, time.monotonic() - began)
        return client

    def _one(self, client: imaplib.IMAP4, token: str, rng: random.Random) -> None:
        text = f"Subject: {token}\r\n\r\nx\r\n".encode()

        def act(state: str, *words: str) -> None:
            self.actions.attempt(token, state)
            status, said = client.uid(*words) if words else client.append(INBOX, "", "", text)
            if status != "OK":
                raise AssertionError(f"{token}: {words}: {status} {said}")
            self.actions.acknowledge(token, state)

        act(INBOX)
        client.noop()
        uid = client.uid("SEARCH", f'SUBJECT "{token}"')[1][0].split()[-1].decode()
        act(FLAGGED, "STORE", uid, "+FLAGS", r"(\Flagged)")
        end = rng.choice((INBOX, KEPT, GONE))
        if end == KEPT:
            act(f"{KEPT} flagged", "MOVE", uid, KEPT)
        elif end == GONE:
            self.actions.attempt(token, f"{FLAGGED} deleted")
            client.uid("STORE", uid, "+FLAGS", r"(\Deleted)")
            act(GONE, "EXPUNGE", uid)

    def judge(self) -> tuple[str, ...]:
        """What is not as it was left."""
        found: dict[str, list[str]] = {}
        for address, folder in itertools.product(self.to, (INBOX, KEPT)):
            with imap(self.project, address, self.password, self.edge) as client:
                client.select(folder, readonly=True)
                _, data = client.fetch("1:*", "(FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
                for part in data:
                    if isinstance(part, tuple) and (m := SUBJECT.search(part[1])) and m[1].startswith(b"c"):
                        flags = [f for f in ("flagged", "deleted") if f"\\{f}".encode() in part[0].lower()]
                        found.setdefault(m[1].decode(), []).append(" ".join([folder, *flags]))
        return self.actions.judge(found)

    def __str__(self) -> str:
        return (
            f"{self.logins} IMAP logins, the longest {self.longest:.2f} s, {len(self.failed)} failed, "
            f"{self.byes} sent away with BYE, {len(self.cut)} cut, {len(self.actions.possible)} messages"
            f"{''.join(self.failed[:3])}"
        )


# One process a host, for the whole time: what looks 20 times a second must not start programs, or the machine does
# little else. A process gets its mounts in its first moments; a fence becomes the service without a new process.
_LOOK = r"""
import os, re, time
mounted = re.compile(rb" [^ ]*/volumes/VOLUME/_data [^ ]+ rw")
known = {}
while True:
    now, there, count = time.time(), {}, 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        since, has = known.get(pid, (now, False))
        try:
            if not has and now - since < 2:
                has = mounted.search(open(f"/proc/{pid}/mountinfo", "rb").read()) is not None
            count += has and b"PROGRAM" in open(f"/proc/{pid}/cmdline", "rb").read()
        except OSError:
            pass  # it has just ended
        there[pid] = since, has
    known = there
    print(f"{time.time():.3f}", count, flush=True)
    time.sleep(0.05)
"""


@dataclass
class Watch:
    """Watches the hosts' own kernels: on how many hosts a program has a volume mounted, all the time."""

    project: Project
    volume: str = "mail_mail"
    program: str = "dovecot"
    looks: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        script = _LOOK.replace("VOLUME", self.volume).replace("PROGRAM", self.program)
        for host in HOSTS:
            thread = threading.Thread(target=self._look, args=(host, script), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def _look(self, host: str, script: str) -> None:
        """Again and again: a host may be switched off and on meanwhile."""
        while not self._ended.wait(0.2):
            process = self._processes[host] = subprocess.Popen(
                self.project.on(host, "python3", "-u", "-c", script),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if m := re.fullmatch(r"(\d+\.\d+) (\d+)\n", line):  # Docker may say why it can't, on the same stream
                    self.looks.setdefault(host, []).append((float(m[1]), int(m[2])))
            process.wait()

    def __exit__(self, *_: object) -> None:
        self._until = time.time()
        self._ended.set()
        for process in self._processes.values():
            process.kill()
        for host in HOSTS:
            self.project.sh(host, "pkill -f _data.*[m]ountinfo || true", check=False)
        for thread in self._threads:
            thread.join(10)

    def spans(self) -> dict[str, list[tuple[float, float]]]:
        """For each host the times (first look, last look) during which the program was there."""
        found: dict[str, list[tuple[float, float]]] = {}
        for host, looks in self.looks.items():
            spans: list[tuple[float, float]] = []
            before = False
            for when, count in looks:
                if count and before:
                    spans[-1] = (spans[-1][0], when)
                elif count:
                    spans.append((when, when))
                before = bool(count)
            found[host] = spans
        return found

    def blind(self) -> list[str]:
        """Hosts that were not watched to the end."""
        return [host for host in HOSTS if self.looks.get(host, [(0.0, 0)])[-1][0] < self._until - 15]

    def overlaps(self) -> list[str]:
        """Two hosts at the same time: must be empty. One clock: the hosts are containers of one machine."""
        every = [(start, end, host) for host, spans in self.spans().items() for start, end in spans]
        every.sort()
        return [
            f"{a[2]} until {a[1]:.2f} and {b[2]} from {b[0]:.2f}"
            for i, a in enumerate(every)
            for b in every[i + 1 :]
            if a[2] != b[2] and b[0] < a[1]
        ]


@dataclass
class Probe:
    """Asks for a greeting again and again; the longest time without one is the gap."""

    ask: Callable[[], bool]
    pause: float = 0.05
    good: list[tuple[float, float]] = field(default_factory=list)
    bad: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Probe:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def _work(self) -> None:
        while not self._stop.wait(self.pause):
            began = time.monotonic()
            ok = False
            with contextlib.suppress(Exception):
                ok = self.ask()
            if ok:
                self.good.append((began, time.monotonic()))
            else:
                self.bad += 1

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    @property
    def gap(self) -> float:
        return max((b[1] - a[1] for a, b in zip(self.good, self.good[1:], strict=False)), default=0.0)


# A try that meets nobody has an end: to a container that has just gone it would hang.
_GREETINGS = r"""
use IO::Socket::INET; use IO::Select; $| = 1;
while (1) {
    my (undef, undef, undef, undef, @addresses) = gethostbyname("mda");
    for (@addresses) {
        my $to = IO::Socket::INET->new(PeerAddr => inet_ntoa($_), PeerPort => 24, Timeout => 0.5) or next;
        IO::Select->new($to)->can_read(0.5) or next;
        my $line = <$to>;
        if ($line =~ /^220/) { print "yes\n"; print $to "QUIT\r\n"; last }
    }
    select undef, undef, undef, $ARGV[0];
}
"""


@contextlib.contextmanager
def lmtp_probe(project: Project, mta: str = "host1") -> Iterator[list[float]]:
    """20 LMTP greetings a second (fewer on slow hosts), asked in the MTA's own network by name, as Postfix does: each
    address that the name has. Yields a list that at the end holds the moments (seconds) at which one was seen."""
    seen: list[float] = []
    running: list[subprocess.Popen[str]] = []
    ended = threading.Event()

    def ask() -> None:
        # one process for all of them: what measures must not be what the machine is busy with
        perl = ("perl", "-e", _GREETINGS, f"{0.05 * SLOW:g}")
        words = project.on(mta, "docker", "exec", "-i", container(project, mta, "mail_mta"), *perl)
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            running[:] = [process]
            assert process.stdout is not None
            for _ in process.stdout:
                seen.append(time.time())

    def again_and_again() -> None:
        """The MTA's container may be another one after a fault."""
        while not ended.is_set():
            with contextlib.suppress(AssertionError):  # there is none now
                ask()
            ended.wait(0.2)

    thread = threading.Thread(target=again_and_again, daemon=True)
    thread.start()
    try:
        yield seen
        seen.append(time.time())  # what was not seen until now counts
    finally:
        ended.set()
        for process in running:
            process.kill()
        project.sh(mta, "pkill -f [P]eerPort || true", check=False)
        thread.join(10)


def longest(moments: Sequence[float]) -> float:
    return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)
