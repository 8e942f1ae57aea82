"""Moves under mail: nothing lost, never two writers. What goes wrong in one: ``test_move_faults.py``."""

from __future__ import annotations

import os
import re
import time

import pytest
from conftest import HOSTS, MAIL, STACK, Project, eventually
from mailing import PASSWORD, arrives, container, deploy, forget, healed, marker, queue, send, variant, volume
from moving import (
    NO_PROOF,
    READER,
    USERS,
    call,
    clean,
    has_begun,
    migrate,
    other,
    place,
    told,
    wait_for,
    with_hook,
)
from stream import Clients, Stream, Watch, lmtp_probe, longest

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("back_to_the_beginning")]


def test_there_and_back_under_mail(mailing: Project) -> None:
    """20 mails a second, and IMAP clients; two moves. Each mail is found once and each action of a client was kept, no
    connection failed; deploy afterwards moves nothing."""
    source = place(mailing)
    target = other(source)
    name, began = f"a{time.time_ns()}", time.time()
    with (
        Watch(mailing) as watch,
        lmtp_probe(mailing) as greetings,
        Clients(mailing, [READER], PASSWORD) as clients,
        Stream(mailing, USERS, PASSWORD, name=name) as stream,
    ):
        time.sleep(2)
        first = migrate(mailing, target, "--times", check=0)
        time.sleep(1)
        second = migrate(mailing, source, check=0)
        time.sleep(2)
    for result, host in ((first, target), (second, source)):
        assert re.search(rf"^migrate: mda is on {host}; it was away \d+\.\d\d s$", result.stdout, re.M), str(result)
        assert "compared: " in result.stdout and "what was held has arrived" in result.stdout
    verdict = stream.judge(source)
    said = [line for line in (first.stdout + second.stdout).splitlines() if "away" in line]
    print(f"{verdict}; LMTP gap {longest(greetings):.2f} s; {said}; {clients}")
    assert verdict.is_clean and verdict.queued == 0 and verdict.duplicated == 0, str(verdict)
    assert verdict.acknowledged > 100
    assert clients.judge() == () and (clients.failed, clients.cut) == ([], []) and clients.byes, str(clients)
    assert watch.overlaps() == [] and watch.blind() == []
    assert failed_deliveries(mailing, began) == [], "what was held waited without an attempt"
    assert {host for host, spans in watch.spans().items() if spans} == {source, target}
    clean(mailing)
    assert marker(mailing, source, "mail_mail")["state"] == "live"
    assert marker(mailing, target, "mail_mail")["state"] == "stale"
    assert deploy(mailing, check=0).stdout == "deploy: nothing to do\n"
    assert f"mda      {source}" in mailing.fab("status", "--inventory", MAIL, check=0).stdout


def failed_deliveries(project: Project, since: float) -> list[str]:
    """LMTP attempts that came to nothing; ``since``: seconds since the epoch."""
    mta = container(project, "host1", "mail_mta")
    said = project.sh("host1", f"docker logs --since {since:.3f} {mta} 2>&1").splitlines()
    assert any("/lmtp[" in line and "status=sent" in line for line in said)
    return [line for line in said if "/lmtp[" in line and "status=" in line and "status=sent" not in line]


def test_a_move_to_where_it_is_already_does_nothing(mailing: Project) -> None:
    where = place(mailing)
    assert migrate(mailing, where, check=0).stdout == f"migrate: mda is on {where} already, nothing to do\n"


def test_what_runs_is_moved_whatever_the_files_say(mailing: Project) -> None:
    """The stack has been edited since the last deploy: that is for the next deploy."""
    changed = variant(mailing, "changed", {"mda/mda": lambda text: f"{text}# changed\n"})
    source = place(mailing)
    target = other(source)
    mailing.fab("migrate.purge", "--inventory", MAIL, check=0)
    before = image(mailing, source)
    words = ("migrate", "--service", "mda", "--to", target, "--inventory", changed, "--no-verify")
    mailing.fab(*words, timeout=240, check=0)
    assert image(mailing, target) == before and place(mailing) == target
    clean(mailing)
    assert deploy(mailing, check=0).stdout == "deploy: nothing to do\n"


def image(project: Project, host: str) -> str:
    return project.sh(host, f"docker inspect -f '{{{{.Config.Image}}}}' {container(project, host, 'mail_mda')}")


def test_plan_and_check_change_nothing(mailing: Project) -> None:
    target = other(place(mailing))
    before = {host: mailing.sh(host, "docker volume ls -q; docker ps -aq; ls /run") for host in HOSTS}
    shown = migrate(mailing, target, "--plan", check=0).stdout
    assert "+ cutover: " in shown and "no way back from here" in shown
    assert "+ cutover" not in migrate(mailing, target, "--check-only", check=0).stdout
    assert before == {host: mailing.sh(host, "docker volume ls -q; docker ps -aq; ls /run") for host in HOSTS}


HARD = r"""
import os, sys
root, megabytes, mails = os.fsencode(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder = root + b"/Maildir/.big/cur"
os.makedirs(folder, exist_ok=True)
for number in range(mails):
    text = b"Subject: big %d\n\nbody %d\n" % (number, number)
    with open(folder + b"/%d.M1P1.mda,S=%d:2,S" % (1700000000 + number, len(text)), "wb") as file:
        file.write(text)
with open(root + b"/archive", "wb") as file:
    for _ in range(megabytes):
        file.write(os.urandom(2**20))
    file.seek(2**30, 1)  # a hole
    file.write(b"end")
for name in (b"caf\xe9", "\u90ae\u4ef6".encode(), b"two\nlines", b" blank ", b"-rf", b"a'b\"c", b"x" * 255):
    with open(root + b"/" + name, "wb") as file:
        file.write(name)
os.link(root + b"/archive", root + b"/hard link")
os.symlink(b"nowhere", root + b"/link")
for place, folders, files in os.walk(root):
    for name in (*folders, *files):
        os.chown(os.path.join(place, name), os.stat(root).st_uid, os.stat(root).st_gid, follow_symlinks=False)
"""


@pytest.mark.timeout(1800)
def test_a_mailbox_that_is_hard_to_copy(mailing: Project) -> None:
    """A large file with a hole, a folder with many mails, which is renamed between two passes, names in any encoding,
    links. ``SWARMMAIL_BIG=1``: 2 GB and 100,000 mails."""
    megabytes, mails = (2000, 100_000) if os.environ.get("SWARMMAIL_BIG") else (20, 2000)
    source = place(mailing)
    target = other(source)
    home = f"{volume(mailing, source, 'mail_mail')}/lab.test/ann"
    arrives(mailing, USERS[0], PASSWORD, send(mailing, USERS[0]))  # so that her home is there
    script = f"python3 - {home} {megabytes} {mails} <<'END'\n{HARD}\nEND"
    mailing.sh(source, script, timeout=600)
    look = "find . -path './Maildir*' -prune -o -printf '%y %s %m %U %G %T@ %n %p %l\\0' | sort -z | sha256sum"
    look = f"cd {home} && {look} && sha256sum <archive && du -m archive | cut -f1"
    before = mailing.sh(source, look, timeout=120)
    try:
        words = ("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF, "--times")
        process = mailing.start(*words)
        wait_for(process, " pass 1: ")
        task = container(mailing, source, "mail_mda")
        mailing.sh(source, f"docker exec {task} doveadm mailbox rename -u {USERS[0]} big renamed", timeout=120)
        ran = mailing.finish(process, 1500)
        assert ran.status == 0, str(ran)
        print(ran.stderr + ran.stdout)
        there = home.replace(volume(mailing, source, "mail_mail"), volume(mailing, target, "mail_mail"))
        assert mailing.sh(target, look.replace(home, there), timeout=120) == before
        task = container(mailing, target, "mail_mda")
        count = f"docker exec {task} doveadm mailbox status -u {USERS[0]} messages renamed"
        assert f"messages={mails}" in mailing.sh(target, count, timeout=300)
        arrives(mailing, USERS[0], PASSWORD, send(mailing, USERS[0]))
    finally:
        where = place(mailing)
        home = f"{volume(mailing, where, 'mail_mail')}/lab.test/ann"
        mailing.sh(where, f"cd {home} && find . -maxdepth 1 -mindepth 1 ! -name 'Maildir*' -delete", timeout=120)
        task = container(mailing, where, "mail_mda")
        mailing.sh(
            where, f"docker exec {task} doveadm mailbox delete -u {USERS[0]} big renamed", check=False, timeout=300
        )
    clean(mailing)


def test_two_operators(mailing: Project) -> None:
    target = other(place(mailing))
    first = mailing.start("migrate", "--service", "mda", "--to", target, "--inventory", MAIL)
    try:
        eventually(lambda: has_begun(mailing), 60, "it began")
        migrate(mailing, target).error("lock", "has been at work on 'migrate")
        deploy(mailing).error("")
    finally:
        assert mailing.finish(first, 240).status == 0
    clean(mailing)


def test_purge_removes_old_copies_only(mailing: Project) -> None:
    source = place(mailing)
    target = other(source)
    migrate(mailing, target, check=0)
    assert (
        f"+ remove {source}: volume mail_mail"
        in mailing.fab("migrate.purge", "--plan", "--inventory", MAIL, check=0).stdout
    )
    mailing.sh(source, "docker system prune -af --volumes >/dev/null; docker volume prune -af >/dev/null")
    assert volume(mailing, source, "mail_mail"), "the old copy is held against prune"
    assert f"removed {source}: volume mail_mail" in mailing.fab("migrate.purge", "--inventory", MAIL, check=0).stdout
    assert not volume(mailing, source, "mail_mail") and place(mailing) == target
    assert mailing.fab("migrate.purge", "--inventory", MAIL, check=0).stdout == "migrate.purge: nothing to do\n"


def test_the_mta_moves_with_its_queue(mailing: Project) -> None:
    """Mails that are deferred: each arrives once, under the id that it had, through the MTA on its new host. The public
    address follows as soon as it answers there."""
    with_hook(mailing)
    source = place(mailing)
    name = f"q{time.time_ns()}"
    count = int(os.environ.get("SWARMMAIL_QUEUED", "60"))
    mta = container(mailing, "host1", "mail_mta")
    hold = "postconf -e defer_transports=lmtp && postfix reload"
    mailing.sh("host1", f"docker exec {mta} sh -c '{hold}'")
    stream = Stream(mailing, USERS, PASSWORD, name=name, rate=50, hosts=("host1", "host2"))
    with stream:
        eventually(lambda: len(queue(mailing)) >= count, 60, "mail waits in the queue")
        stream.stop()
    before = {mail["queue_id"] for mail in queue(mailing)}
    result = migrate(mailing, "host2", service="mta", check=0)
    assert "mail is taken at host2" in result.stdout and "the public address moves, too" in result.output
    listed = mailing.sh("host2", f"docker logs {container(mailing, 'host2', 'mail_mta')} 2>&1")
    assert {queue_id for queue_id in before if f"{queue_id}: removed" not in listed} == {
        mail["queue_id"] for mail in queue(mailing, "host2")
    }, "ids stay"
    verdict = stream.judge(source, mta="host2")
    print(verdict)
    assert verdict.is_clean and verdict.queued == verdict.duplicated == 0 and verdict.acknowledged >= count, str(
        verdict
    )
    assert place(mailing, "mail_mta") == "host2"
    token = send(mailing, USERS[0], host="host2")
    arrives(mailing, USERS[0], PASSWORD, token)
    with Stream(mailing, USERS, PASSWORD, name=f"r{time.time_ns()}", rate=5, hosts=("host2", "host1")) as under:
        time.sleep(1)
        migrate(mailing, "host1", service="mta", check=0)
        time.sleep(2)
    verdict = under.judge(source)
    print(f"under mail: {verdict}")
    assert verdict.is_clean and verdict.duplicated == 0, str(verdict)
    assert told(mailing) == [call(mailing, "mta", *way, "220") for way in (("host1", "host2"), ("host2", "host1"))]


def extra(text: str) -> str:
    """The stack with one more service with data: something that appends to a file, and is no mail."""
    service = (
        "  extra:\n    image: swarmmail/mta\n    build: ./mta\n"
        "    entrypoint: [sh, -c, 'trap exit TERM; while :; do date +%s >>/data/log; sleep 0.1; done']\n"
        "    volumes: ['extra:/data', 'more:/more']\n    networks: [local-mail-delivery]\n"
        "    deploy: {endpoint_mode: dnsrr}\n"
    )
    text = text.replace("\nnetworks:\n", f"\n{service}\nnetworks:\n")
    return text.replace("\nvolumes:\n", "\nvolumes:\n  extra:\n  more:\n", 1)


def test_any_service_with_volumes_moves(mailing: Project) -> None:
    name = variant(mailing, "extra", {"stack.yml": extra}, placement={**STACK["placement"], "extra": "host2"})
    deploy(mailing, inventory=name, check=0)
    try:
        before = mailing.sh("host2", f"cat {volume(mailing, 'host2', 'mail_extra')}/log").splitlines()
        result = mailing.fab(
            "migrate", "--service", "extra", "--to", "host3", "--inventory", name, "--no-verify", check=0, timeout=240
        )
        assert "migrate: extra is on host3" in result.stdout
        after = mailing.sh("host3", f"cat {volume(mailing, 'host3', 'mail_extra')}/log").splitlines()
        assert after[: len(before)] == before and len(after) > len(before)
        assert marker(mailing, "host3", "mail_more")["state"] == "live"
        there = volume(mailing, "host3", "mail_extra")
        eventually(
            lambda: len(mailing.sh("host3", f"cat {there}/log").splitlines()) > len(after), 10, "it goes on there"
        )
        assert (
            mailing.sh("host2", f"cat {volume(mailing, 'host2', 'mail_extra')}/log").splitlines()
            == after[: len(mailing.sh("host2", f"cat {volume(mailing, 'host2', 'mail_extra')}/log").splitlines())]
        ), "nothing was written to the old copy after the last pass"
    finally:
        healed(mailing)
        for host in ("host2", "host3"):
            mailing.sh(
                host, "docker rm -f swarmmail-holder-mail-extra; docker volume rm -f mail_extra mail_more", check=False
            )
        forget(mailing, "extra")
