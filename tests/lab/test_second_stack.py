"""A stack that was not made for swarmmail: its own names, images, users and paths. Only labels say what is what."""

from __future__ import annotations

import imaplib
import shutil
import smtplib
import ssl

import pytest
from conftest import REPO, STACK, Project, eventually
from mailing import send, trusting

pytestmark = pytest.mark.lab

ADDRESS = "someone@lab.test"


def inbox(project: Project, token: str) -> int:
    """Mails with a token, by STARTTLS on 143; this stack has no 993."""
    with imaplib.IMAP4(project.address("host3"), 143, timeout=20) as client:
        client.starttls(trusting(project))
        client.login(ADDRESS, "pica's own secret")
        client.select("INBOX", readonly=True)
        return len(client.search(None, "SUBJECT", token)[1][0].split())


def test_another_collectives_stack_works_unchanged(fresh: Project) -> None:
    shutil.copytree(REPO / "tests" / "lab" / "stacks" / "pica", fresh.root / "stacks" / "pica", dirs_exist_ok=True)
    placement = {"pica-mail-mta": "host1", "pica-mail-mda": "host3"}
    name = fresh.inventory("pica", stack={**STACK, "name": "pica", "path": "../stacks/pica", "placement": placement})
    environment = {"SWARMMAIL_INVENTORY": name}
    result = fresh.fab("bootstrap", "deploy", env=environment, timeout=400, check=0)
    assert "deploy: mail taken by host1 (SMTP) and read back from host3 (IMAP)" in result.stdout
    assert fresh.fab("deploy", env=environment, check=0).stdout == "deploy: nothing to do\n"

    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        send(fresh, ADDRESS)
    assert refused.value.recipients[ADDRESS][0] == 550
    fresh.fab("user.add", ADDRESS, env=environment, stdin="pica's own secret\n", check=0)
    token = send(fresh, ADDRESS)
    eventually(lambda: inbox(fresh, token) == 1, 20, "the mail is in the mailbox")

    screen = fresh.fab("status", env=environment, check=0).stdout
    for words in ("pica-mail-mta", "pica-mail-mda", "pica_outbox", "pica_vhosts", "queue: 0 messages"):
        assert words in screen
    with smtplib.SMTP(fresh.address("host1"), 25, timeout=20) as client:
        client.starttls(context=ssl.create_default_context(cafile=str(fresh.root / ".lab" / "ca.crt")))
