"""Every runbook, executed: each command block of ``docs/runbooks``, in order, in the situation its page names.

A page needs a function here that makes its situation: ``@situation("name-of-the-page")``.
"""

from __future__ import annotations

import secrets
import shutil
import smtplib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runbook
import trustme
from conftest import REPO, Project, eventually, temporary

pytestmark = pytest.mark.lab

FOLDER = REPO / "docs" / "runbooks"
_LIST = (FOLDER / "README.md").read_text()
VIRTUAL = ("firewall-was-reloaded", "host-lost-power")
"""Pages that need hosts with kernels of their own: ``test_vm.py`` makes their situations."""
PAGES = {
    path.stem: path
    for path in sorted(FOLDER.glob("*.md"), key=lambda path: _LIST.find(f"({path.name})"))
    if path.stem not in ("README", *VIRTUAL)
}
"""In the order of the list in README.md: a cluster that one page leaves is there for the next."""
EXAMPLES = "192.0.2.1"
"""Address of hostN in the pages: 192.0.2.1N (RFC 5737)."""
PASSWORD = "what the operator types"

Situation = Callable[[Project], Callable[[], None] | None]
SITUATIONS: dict[str, Situation] = {}


def situation(page: str) -> Callable[[Situation], Situation]:
    """Decorator: this function makes of a lab of three hosts, in any state, what the page is about. What it
    returns, if anything, is called when the page is done: for what the page itself cannot show."""

    def register(function: Situation) -> Situation:
        SITUATIONS[page] = function
        return function

    return register


@pytest.fixture(scope="module")
def books(place: Path) -> Iterator[Project]:
    """A lab of its own: pages add hosts."""
    with temporary(place, "runbooks") as project:
        project.up(3)
        yield project


def addresses(project: Project) -> dict[str, str]:
    return {f"{EXAMPLES}{machine.name.removeprefix('host')}": machine.address for machine in project.machines}


def execute(project: Project, page: str, timeout: float = 180, **env: str) -> None:
    environment = project.environment({"NO_COLOR": "1", **env})
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def shell(host: str, words: str) -> tuple[int, str]:
        if host == runbook.OPERATOR:
            command, given, environ = ["sh", "-c", words], f"{PASSWORD}\n", environment
        else:
            command, given, environ = project.on(host, "sh", "-c", words), "\n", None  # moby#37870
        done = subprocess.run(
            command,
            cwd=project.root,
            env=environ,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    runbook.execute(runbook.read(FOLDER / f"{page}.md"), shell, project.root, addresses(project))


# ---- situations ----


@situation("first-install")
def new_hosts(project: Project) -> None:
    """Hosts with nothing on them; the operator has a key that they let in, a certificate, and no inventory."""
    project.reset()
    for file in (project.root / "inventories").iterdir():
        if file.name != "example.yml":
            file.unlink()
    home = project.root / "home"
    for folder in (".ssh", "tls"):
        (home / folder).mkdir(mode=0o700, exist_ok=True)
    shutil.copy(project.root / ".lab" / "id_ed25519", home / ".ssh")
    issued = trustme.CA().issue_cert("mx.example.org")
    issued.private_key_pem.write_to_path(home / "tls" / "mx.example.org.key")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    (home / "tls" / "mx.example.org.crt").write_bytes(chain)


def installed(project: Project) -> None:
    """What ``first-install`` leaves before its last section: the three hosts, the stack, one account."""
    [inventory] = [step for step in runbook.read(PAGES["first-install"]).steps if isinstance(step, runbook.Written)]
    text = runbook.replace(inventory.text, addresses(project))
    there = project.root / inventory.path
    if not there.exists() or there.read_text() != text or project.fab("plan").status != 0:
        new_hosts(project)
        there.write_text(text)
        shutil.copy(project.root / ".lab" / "known_hosts", there.parent)
        project.fab("bootstrap", "--no-check", "deploy", "--no-verify", check=0, timeout=300)
    if "alice@example.org" not in project.fab("user.list", check=0).stdout:
        project.fab("user.add", "--address", "alice@example.org", stdin=f"{PASSWORD}\n", check=0)


@situation("add-a-host")
def three_hosts_and_a_new_one(project: Project) -> None:
    project.up(4)
    installed(project)
    known = project.root / "inventories" / "known_hosts"
    new = project.address("host4")
    known.write_text("".join(line for line in known.open() if not line.startswith(f"{new} ")))


@situation("encryption-broken")
def the_guard_is_gone(project: Project) -> None:
    installed(project)
    project.sh("host3", "systemctl stop swarmmail-guard; nft delete table inet swarmmail")


@situation("mail-does-not-cross")
def the_tunnels_port_is_dropped(project: Project) -> None:
    installed(project)
    project.sh(
        "host3",
        "nft add table inet mistake; nft 'add chain inet mistake in { type filter hook input priority 0; }'; "
        "nft add rule inet mistake in udp dport 51820 drop",
    )
    with smtplib.SMTP(project.address("host1"), 25, timeout=20) as smtp:
        smtp.sendmail("bob@example.com", ["alice@example.org"], "Subject: waiting\n\nwaiting\n")


@situation("mail-stuck-in-the-queue")
def docker_stopped_on_the_host_of_the_mda(project: Project) -> Callable[[], None]:
    installed(project)
    project.sh("host3", "systemctl stop docker.socket docker.service")
    token = secrets.token_hex(8)
    with smtplib.SMTP(project.address("host1"), 25, timeout=20) as smtp:
        smtp.sendmail("bob@example.com", ["alice@example.org"], f"Subject: {token}\n\nwaiting\n")

    def deferred() -> bool:
        return "unable to look up host" in project.fab("queue.list", check=0).stdout

    eventually(deferred, 30, "the mail is deferred")

    def delivered() -> None:
        """The queue is empty because the mail arrived, once, and not because it was given up."""
        maildir = "/var/lib/docker/volumes/mail_mail/_data/example.org/alice/Maildir"
        assert project.sh("host3", f"cat {maildir}/new/* | grep -c 'Subject: {token}'", check=False) == "1\n"

    return delivered


def unmoved(project: Project) -> None:
    """``installed``, each service where the inventory begins it, and no copy elsewhere; generations begin anew."""
    for host in ("host1", "host2", "host3"):
        project.sh(host, "systemctl start docker")
    project.reset()
    installed(project)


@situation("move-the-mda")
def the_mda_on_host3(project: Project) -> None:
    unmoved(project)


@situation("move-the-mta")
def the_mta_on_host1(project: Project) -> None:
    unmoved(project)


@situation("maintenance-of-a-host")
def the_mda_on_a_host_that_needs_work(project: Project) -> None:
    unmoved(project)


@situation("a-move-was-interrupted")
def a_move_that_was_killed(project: Project) -> None:
    unmoved(project)
    move = project.start("migrate", "--service", "mda", "--to", "host2")

    def begun() -> bool:
        listed = project.sh("host1", "docker config ls -q --filter name=swarmmail-move")
        return bool(listed.strip())

    eventually(begun, 60, "the move has begun")
    move.kill()
    project.finish(move)


# ---- tests ----


def test_every_page_has_a_situation_and_every_situation_a_page() -> None:
    assert set(SITUATIONS) == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, books: Project) -> None:
    """What the page shows is what is printed, from the first block to the last."""
    assert page in SITUATIONS, f"docs/runbooks/{page}.md has no situation in {Path(__file__).name}"
    afterwards = SITUATIONS[page](books)
    execute(books, page)
    if afterwards is not None:
        afterwards()
