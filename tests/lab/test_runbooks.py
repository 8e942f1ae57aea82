"""Every runbook, executed: each command block of ``docs/runbooks``, in order, in the situation its page names.

A page needs a function here that makes its situation: ``@situation("name-of-the-page")``.
"""

from __future__ import annotations

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
PAGES = {path.stem: path for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"}
EXAMPLES = "192.0.2.1"
"""Address of hostN in the pages: 192.0.2.1N (RFC 5737)."""
PASSWORD = "what the operator types"

Situation = Callable[[Project], None]
SITUATIONS: dict[str, Situation] = {}


def situation(page: str) -> Callable[[Situation], Situation]:
    """Decorator: this function makes of a lab of three hosts, in any state, what the page is about."""

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


def execute(project: Project, page: str) -> None:
    environment = project.environment({"NO_COLOR": "1"})
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def shell(host: str, words: str) -> tuple[int, str]:
        if host != runbook.OPERATOR:
            command = ["docker", "exec", project.container(host), "sh", "-c", words]
            given, environ = "", None
        else:
            command, given, environ = ["sh", "-c", words], f"{PASSWORD}\n", environment
        done = subprocess.run(
            command,
            cwd=project.root,
            env=environ,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        return done.returncode, done.stdout

    runbook.execute(runbook.read(PAGES[page]), shell, project.root, addresses(project))


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
    new_hosts(project)
    page = runbook.read(PAGES["first-install"])
    [inventory] = [step for step in page.steps if isinstance(step, runbook.Written)]
    real = addresses(project)
    text = inventory.text
    for example, address in real.items():
        text = text.replace(example, address)
    (project.root / inventory.path).write_text(text)
    shutil.copy(project.root / ".lab" / "known_hosts", project.root / "inventories" / "known_hosts")
    project.fab("bootstrap", "deploy", check=0, timeout=300)
    project.fab("user.add", "--address", "alice@example.org", stdin=f"{PASSWORD}\n", check=0)


@situation("add-a-host")
def three_hosts_and_a_new_one(project: Project) -> None:
    project.up(4)
    installed(project)
    known = project.root / "inventories" / "known_hosts"
    new = project.address("host4")
    known.write_text("".join(line for line in known.open() if not line.startswith(f"{new} ")))


@situation("mail-stuck-in-the-queue")
def docker_stopped_on_the_host_of_the_mda(project: Project) -> None:
    installed(project)
    project.sh("host3", "systemctl stop docker.socket docker.service")
    with smtplib.SMTP(project.address("host1"), 25, timeout=20) as smtp:
        smtp.sendmail("bob@example.com", ["alice@example.org"], "Subject: waiting\n\nwaiting\n")

    def deferred() -> bool:
        return "unable to look up host" in project.fab("queue.list", check=0).stdout

    eventually(deferred, 30, "the mail is deferred")


# ---- tests ----


def test_every_page_has_a_situation_and_every_situation_a_page() -> None:
    assert set(SITUATIONS) == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, books: Project) -> None:
    """What the page shows is what is printed, from the first block to the last."""
    assert page in SITUATIONS, f"docs/runbooks/{page}.md has no situation in {Path(__file__).name}"
    SITUATIONS[page](books)
    execute(books, page)
