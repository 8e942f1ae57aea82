"""Mail itself: who is let in, who is refused, and what happens while the MDA is away."""

from __future__ import annotations

import contextlib
import imaplib
import json
import smtplib
import socket
import time

import pytest
from conftest import HOSTS, MAIL, Project, eventually
from mailing import (
    PASSWORD,
    account,
    accounts,
    arrives,
    container,
    imap,
    mails,
    queue,
    send,
    services,
    smtp,
    trusting,
    volume,
)

pytestmark = pytest.mark.lab


def test_accounts_come_and_go_without_a_restart(deployed: Project) -> None:
    before = container(deployed, "host1", "mail_mta"), container(deployed, "host3", "mail_mda")
    address = account(deployed, "anna")
    assert address in accounts(deployed)
    token = send(deployed, address, "hello")
    assert b"hello" in arrives(deployed, address, PASSWORD, token)
    deployed.fab("user.passwd", address, "--inventory", MAIL, stdin="another one\n", check=0)
    assert len(mails(deployed, address, "another one", token)) == 1
    with pytest.raises(imaplib.IMAP4.error), imap(deployed, address, PASSWORD):
        pass
    twice = deployed.fab("user.add", address, "--inventory", MAIL, stdin="x\n")
    assert twice.status == 1 and len(twice.stderr.splitlines()) == 1, str(twice)
    deployed.fab("user.remove", address, "--inventory", MAIL, "--mail", check=0)
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        send(deployed, address)
    assert refused.value.recipients[address][0] == 550
    with pytest.raises(imaplib.IMAP4.error), imap(deployed, address, "another one"):
        pass
    assert (container(deployed, "host1", "mail_mta"), container(deployed, "host3", "mail_mda")) == before


@pytest.mark.parametrize("folder", ["", "/.Sent"])
def test_what_a_killed_mda_has_locked_is_open_after_its_start(deployed: Project, folder: str) -> None:
    """A process that dies while it writes leaves a lock: Dovecot would let people wait for two minutes."""
    name = "lena" if folder else "lene"
    address = account(deployed, name)
    token = send(deployed, address)
    arrives(deployed, address, PASSWORD, token)
    with imap(deployed, address, PASSWORD) as client:
        client.append("Sent", "", "", b"Subject: sent\r\n\r\n")
    before = container(deployed, "host3", "mail_mda")
    place = f"{volume(deployed, 'host3', 'mail_mail')}/lab.test/{name}/Maildir{folder}"
    lock = f"{place}/dovecot-uidlist.lock"
    deployed.sh("host3", f"echo 7:another >{lock}; chown --reference={place} {lock}; docker kill {before}")
    eventually(lambda: container(deployed, "host3", "mail_mda") not in ("", before), 60, "it is started anew")
    with imap(deployed, address, PASSWORD) as client:  # which waits 20 s for an answer
        assert client.select("Sent" if folder else "INBOX")[0] == "OK"
        client.append("Sent" if folder else "INBOX", "", "", b"Subject: more\r\n\r\n")
    deployed.fab("user.remove", address, "--inventory", MAIL, "--mail", check=0)


def test_no_password_no_account(deployed: Project) -> None:
    result = deployed.fab("user.add", "nobody@lab.test", "--inventory", MAIL, stdin="")
    assert result.status == 1 and "no password was given" in result.stderr
    assert "nobody@lab.test" not in accounts(deployed)


def test_an_unknown_recipient_and_a_foreign_domain_are_refused_at_once(deployed: Project) -> None:
    for address, code in (("unknown@lab.test", 550), ("victim@example.com", 554)):
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            send(deployed, address)
        assert refused.value.recipients[address][0] == code


def test_no_relay_for_the_hosts_themselves(deployed: Project) -> None:
    """A connection from a host comes from its gateway address: a network that Postfix must not trust."""
    words = "EHLO host.example.com", "MAIL FROM:<sender@example.com>", "RCPT TO:<victim@example.com>", "QUIT"
    talk = "\n".join(f"echo '{word}' >&3; sleep 0.3" for word in words)
    for host in ("host1", "host2"):
        connect = f"exec 3<>/dev/tcp/{deployed.address('host1')}/25; read -r hello <&3"
        said = deployed.sh(host, f"timeout 20 bash <<'END'\n{connect}\n{talk}\ncat <&3\nEND")
        assert [line[:3] for line in said.splitlines() if "victim" in line] == ["554"], said


def test_mail_waits_for_an_mda_that_does_not_answer(deployed: Project) -> None:
    """Its name is known and its port takes connections, but nothing comes back."""
    address = account(deployed, "doris")
    frozen = container(deployed, "host3", "mail_mda")
    deployed.sh("host3", f"docker pause {frozen}")
    try:
        token = send(deployed, address)
        eventually(lambda: [e["queue_name"] for e in queue(deployed)] == ["deferred"], 40, "the delivery was given up")
        reason = queue(deployed)[0]["recipients"][0]["delay_reason"]
        assert "timed out" in reason, reason
    finally:
        deployed.sh("host3", f"docker unpause {frozen}")
    deployed.fab("queue.flush", "--inventory", MAIL, check=0)
    arrives(deployed, address, PASSWORD, token)


def test_mail_waits_while_the_mda_is_away_and_then_arrives_once(deployed: Project) -> None:
    address = account(deployed, "berta")
    deployed.sh("host1", "docker node update --label-rm swarmmail.mda host3")
    eventually(lambda: not container(deployed, "host3", "mail_mda"), 30, "the MDA has stopped")
    tokens = [send(deployed, address) for _ in range(5)]
    eventually(lambda: len(queue(deployed)) == 5, 20, "all are in the queue")
    deferred = [entry for entry in queue(deployed) if entry["queue_name"] == "deferred"]
    assert all(entry["sender"] == "sender@example.com" for entry in deferred), "nothing bounced"
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        send(deployed, "unknown@lab.test")
    # the queue outlives its container
    deployed.sh("host1", f"docker kill {container(deployed, 'host1', 'mail_mta')}")
    eventually(lambda: container(deployed, "host1", "mail_mta"), 40, "the MTA is back")
    assert deployed.fab("deploy", "--inventory", MAIL, check=0).status == 0
    deployed.fab("queue.flush", "--inventory", MAIL, check=0)
    for token in tokens:
        arrives(deployed, address, PASSWORD, token, seconds=40)
    assert queue(deployed) == []


def test_a_large_mail_crosses(deployed: Project) -> None:
    address = account(deployed, "carla")
    body = "\r\n".join("x" * 70 for _ in range(10 * 2**20 // 72))
    token = send(deployed, address, body)
    assert len(arrives(deployed, address, PASSWORD, token, seconds=60)) > 10e6


def test_no_password_in_clear_and_the_certificate_of_the_inventory(deployed: Project) -> None:
    with imaplib.IMAP4(deployed.address("host1"), 143, timeout=20) as client:
        assert "LOGINDISABLED" in client.capabilities
        with pytest.raises(imaplib.IMAP4.error):
            client.login("anna@lab.test", PASSWORD)
        client.starttls(trusting(deployed))
    with smtp(deployed) as client:
        client.starttls(context=trusting(deployed))
    imaplib.IMAP4_SSL(deployed.address("host1"), 993, ssl_context=trusting(deployed), timeout=20).shutdown()


def test_a_hundred_people_are_served_at_once_and_the_log_is_theirs(deployed: Project) -> None:
    """With a process for each session, 100 are all that Dovecot's defaults allow; and the edge's looks at the MDA took
    a third of them, and filled the log."""
    addresses = [account(deployed, name) for name in ("emma", "emil")]
    begun = time.time()
    with contextlib.ExitStack() as sessions:
        opened = [sessions.enter_context(imap(deployed, address, PASSWORD)) for address in addresses * 55]
        assert {client.select("INBOX")[0] for client in opened} == {"OK"}
        time.sleep(max(0.0, begun + 11 - time.time()))  # the edge looks every 5 s
        since = f"{time.time() - begun:.0f}s"
        log = deployed.sh("host3", f"docker logs --since {since} {container(deployed, 'host3', 'mail_mda')} 2>&1")
    assert log.count("Logged in") >= 110
    strangers = [line for line in log.splitlines() if "Login aborted" in line and "rip=127.0.0.1" not in line]
    assert strangers == []


def test_lmtp_is_reached_from_nowhere_but_the_overlay(deployed: Project) -> None:
    for host in HOSTS:
        with pytest.raises(OSError):
            socket.create_connection((deployed.address(host), 24), timeout=2)
    # Nor by a route to the container itself. That it is one shows when the guard is away.
    inside = deployed.sh(
        "host3",
        "docker inspect -f '{{(index .NetworkSettings.Networks \"local-mail-delivery\").IPAddress}} {{.State.Pid}}' "
        + container(deployed, "host3", "mail_mda"),
    ).split()
    address = deployed.sh("host3", f"nsenter -t {inside[1]} -n ip -4 -o addr show dev eth1").split()[3].split("/")[0]
    deployed.sh("host2", f"ip route add {address} via {deployed.address('host3')}")

    def reached(port: int) -> bool:
        probe = f"timeout 3 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null && echo open || echo closed"
        return deployed.sh("host2", probe) == "open\n"

    try:
        assert not any(reached(port) for port in (24, 143, 10143))
        deployed.sh("host3", "systemctl stop swarmmail-guard; nft delete chain inet swarmmail direct")
        assert reached(24)
    finally:
        deployed.sh("host2", f"ip route del {address}")
        deployed.sh("host3", "systemctl start swarmmail-guard")
    assert socket.create_connection((deployed.address("host1"), 143), timeout=5), "by the edge it is"
    published = [port for raw in services(deployed).values() for port in raw["Spec"]["EndpointSpec"].get("Ports", ())]
    assert sorted(port["TargetPort"] for port in published) == [25, 143, 993]


def test_containers_have_few_rights(deployed: Project) -> None:
    mda = json.loads(deployed.sh("host3", f"docker inspect {container(deployed, 'host3', 'mail_mda')}"))[0]
    mta = json.loads(deployed.sh("host1", f"docker inspect {container(deployed, 'host1', 'mail_mta')}"))[0]
    assert mda["Config"]["User"] == "5000:5000" and mda["HostConfig"]["ReadonlyRootfs"]
    for found in (mda, mta):
        assert found["HostConfig"]["CapDrop"] == ["ALL"] and not found["HostConfig"]["Privileged"]
    assert not mda["HostConfig"]["CapAdd"]
    assert len(mta["HostConfig"]["CapAdd"]) == 6
    for host, service in (("host3", "mail_mda"), ("host1", "mail_mta")):
        status = deployed.sh(host, f"docker exec {container(deployed, host, service)} cat /proc/1/status")
        assert "NoNewPrivs:\t1" in status


def test_no_secret_in_the_services_or_their_environment(deployed: Project) -> None:
    address = account(deployed, "dora", "a password that is seen nowhere")
    seen = json.dumps(list(services(deployed).values())) + deployed.sh("host1", "ps axww; docker config ls")
    assert "a password that is seen nowhere" not in seen and "PRIVATE KEY" not in seen
    assert address not in seen
