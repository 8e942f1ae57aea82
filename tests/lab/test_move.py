"""Moves under mail: nothing lost, never two writers, and one of two good ends whatever went wrong.

``SWARMMAIL_KILLS`` runs (default 4) are killed, in ``SWARMMAIL_FAULTS`` (default 3) something else goes wrong, drawn at
random; ``SWARMMAIL_SEED`` chooses another sequence of them. ``tests/bench/soak.py`` draws many more.
"""

from __future__ import annotations

import imaplib
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import docker.errors
import pytest
from conftest import HOSTS, MAIL, STACK, Project, eventually
from mailing import (
    PASSWORD,
    arrives,
    container,
    deploy,
    healed,
    mark,
    marker,
    queue,
    replaced,
    send,
    trusting,
    variant,
    versions,
    volume,
)
from moving import (
    FAULTS,
    KILLED,
    NO_PROOF,
    READER,
    USERS,
    accounts_for,
    clean,
    finish,
    go_wrong,
    has_begun,
    labelled,
    migrate,
    other,
    place,
    planted,
)
from stream import Clients, Probe, Stream, Watch, lmtp_probe, longest

from swarmmail.cluster import swarm

pytestmark = pytest.mark.lab

SEED = int(os.environ.get("SWARMMAIL_SEED", "20261125"))
KILLS = int(os.environ.get("SWARMMAIL_KILLS", "4"))
OTHERS = int(os.environ.get("SWARMMAIL_FAULTS", "3"))


@pytest.fixture(scope="module", autouse=True)
def back_to_the_beginning(_hosts: Project) -> Iterator[None]:
    """Other files expect each service where the inventory begins it."""
    yield
    _hosts.reset()


@pytest.fixture
def mailing(deployed: Project) -> Iterator[Project]:
    accounts_for(deployed)
    yield deployed


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


def test_a_way_that_is_dead_does_not_keep_the_mail(mailing: Project) -> None:
    """For some moments the name leads to the container that has gone, too, and here nothing comes back from there: what
    is held must not wait until a connection gives up (it was 30 s)."""
    target = other(place(mailing))
    address = mailing.sh("host1", f"docker exec {container(mailing, 'host1', 'mail_mta')} getent ahostsv4 mda").split()
    with planted(mailing, "host1", "mail_mta", f"out ip daddr {address[0]}"):
        result = migrate(mailing, target, check=0)
    [away] = re.findall(r"it was away (\d+\.\d+) s", result.stdout)
    assert float(away) < 15, str(result)
    token = send(mailing, USERS[0])
    arrives(mailing, USERS[0], PASSWORD, token)


def test_plan_and_check_change_nothing(mailing: Project) -> None:
    target = other(place(mailing))
    before = {host: mailing.sh(host, "docker volume ls -q; docker ps -aq; ls /run") for host in HOSTS}
    shown = migrate(mailing, target, "--plan", check=0).stdout
    assert "+ cutover: " in shown and "no way back from here" in shown
    assert "+ cutover" not in migrate(mailing, target, "--check-only", check=0).stdout
    assert before == {host: mailing.sh(host, "docker volume ls -q; docker ps -aq; ls /run") for host in HOSTS}


def survive(project: Project, names: Sequence[str], rng: random.Random) -> None:
    """Each fault in a move of its own, under mail: never lost, never two writers."""
    name, ends = f"f{time.time_ns()}", []
    with Watch(project) as watch, Stream(project, USERS, PASSWORD, name=name, rate=10) as stream:
        for fault in names:
            ends.append(f"{fault}: {go_wrong(project, fault, rng)}")
            print(ends[-1], flush=True)
    verdict = stream.judge(place(project))
    print(f"seed {SEED}: {verdict}")
    assert verdict.is_clean and verdict.queued == 0, f"seed {SEED}: {verdict}\n" + "\n".join(ends)
    assert watch.overlaps() == [] and watch.blind() == [], f"seed {SEED}"


@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_at_random_and_run_again(mailing: Project) -> None:
    """SIGKILL at any moment, then the printed next command or the same one."""
    rng = random.Random(SEED)  # noqa: S311
    survive(mailing, rng.choices(KILLED, k=KILLS), rng)


@pytest.mark.timeout(300 + 120 * OTHERS)
def test_other_faults(mailing: Project) -> None:
    rng = random.Random(SEED)  # noqa: S311
    survive(mailing, rng.sample(sorted(FAULTS.keys() - set(KILLED)), k=OTHERS), rng)


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
        assert process.stderr is not None
        for line in process.stderr:
            if " pass 1: " in line:
                break
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


def test_a_target_that_does_not_serve_is_said_and_can_be_left(mailing: Project) -> None:
    """The data is there and LMTP is not: nothing may start on the source any more, and moving back is a move."""
    source = place(mailing)
    target = other(source)
    process = mailing.start("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF)
    assert process.stderr is not None
    for line in process.stderr:
        if " s  standby: " in line:
            break
    with planted(mailing, target, "mail_mda", "in iifname != lo tcp dport 24"):
        said = mailing.finish(process, 300)
        said.error(target, "is on .* and does not answer: no LMTP greeting within 20 s")
        assert place(mailing) == target
        clean(mailing)
    migrate(mailing, source, check=0)
    token = send(mailing, USERS[0])
    arrives(mailing, USERS[0], PASSWORD, token)


@pytest.mark.parametrize("state", ["stale", "copied by hand", "foreign", "unmarked", "empty"])
def test_a_volume_that_is_not_the_live_one_never_comes_to_life(mailing: Project, state: str) -> None:
    """A hand moves the label to a host with such a volume: its fence says why, and the mailbox stays where it is."""
    source = place(mailing)
    target = other(source)
    if not mailing.sh(target, "docker images -q swarmmail/mda"):
        migrate(mailing, target, check=0)  # without the image the Swarm could start nothing there anyway
        source, target = target, source
    [node] = [n for n in mailing.host("host1").docker.nodes() if n["Spec"]["Labels"]["swarmmail.host"] == target]
    path = volume(mailing, target, "mail_mail")
    if not path:
        path = mailing.host(target).docker.create_volume("mail_mail")["Mountpoint"]
    mailing.sh(
        target, f"docker rm -f $(docker ps -aq -f label=swarmmail.holder) 2>/dev/null; find {path} -mindepth 1 -delete"
    )
    if state == "unmarked":
        mailing.sh(target, f"touch {path}/something")
    elif state != "empty":
        live = volume(mailing, source, "mail_mail")
        text = mailing.sh(source, f"cat {live}/.swarmmail-volume")
        mailing.sh(target, f"cat >{path}/.swarmmail-volume <<'EOF'\n{text}EOF")
        changes = {"stale": {"state": "stale", "node": node["ID"]}, "foreign": {"cluster": "another"}}
        mark(mailing, target, "mail_mail", **changes.get(state, {}))
    words = {
        "stale": "marked 'stale'",
        "copied by hand": "made for node",
        "foreign": "belongs to cluster 'another'",
        "unmarked": "no marker",
        "empty": "is empty",
    }
    try:
        mailing.sh("host1", f"docker node update --label-add swarmmail.mda=true {node['ID']}")
        said = []

        def refused() -> bool:
            said[:] = mailing.sh(
                target,
                "for c in $(docker ps -aq -f label=com.docker.swarm.service.id); do docker logs $c 2>&1; done",
                check=False,
            ).splitlines()
            return any("mda does not start: " in line and re.search(words[state], line) for line in said)

        eventually(refused, 30, f"the fence refuses, said {said}")
        token = send(mailing, USERS[0])
        assert token and container(mailing, source, "mail_mda")
    finally:
        swarm.set_label(mailing.host("host1"), node["ID"], "swarmmail.mda", None)
        mailing.sh(target, f"find {path} -mindepth 1 -delete")
        eventually(
            lambda: (
                not mailing.sh(
                    target, "docker ps -aq -f label=com.docker.swarm.service.name=mail_mda -f status=running"
                )
            ),
            30,
        )


def test_a_volume_with_somebody_s_files_is_refused(mailing: Project) -> None:
    target = other(place(mailing))
    path = volume(mailing, target, "mail_mail") or mailing.host(target).docker.create_volume("mail_mail")["Mountpoint"]
    mailing.sh(target, f"find {path} -mindepth 1 -delete; echo precious >{path}/file")
    try:
        migrate(mailing, target).error(target, "holds files and has no marker")
        assert mailing.sh(target, f"cat {path}/file") == "precious\n"
        clean(mailing)
    finally:
        mailing.sh(target, f"rm {path}/file")


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


# ---- a service without data, and the public address ----

HOOK = r"""#!/bin/bash
# It writes down what it is told, and what the service says to those who come to the new address by now.
case $1 in mta) port=25 ;; edge) port=143 ;; esac
exec 3<>"/dev/tcp/$5/$port" && read -r -t 10 line <&3
echo "$* ${line%% *}" >>"${0%/*}/told"
"""


def with_hook(project: Project, script: str = HOOK) -> None:
    """The inventory of these tests names a program that lets the public address follow."""
    folder = project.root / "address"
    folder.mkdir(exist_ok=True)
    (folder / "told").unlink(missing_ok=True)
    (folder / "hook").write_text(script)
    (folder / "hook").chmod(0o755)
    project.inventory(MAIL, stack={**STACK, "address_hook": "../address/hook"})


def told(project: Project) -> list[str]:
    path = project.root / "address" / "told"
    return path.read_text().splitlines() if path.exists() else []


def call(project: Project, role: str, source: str, target: str, said: str) -> str:
    return f"{role} {source} {target} {project.address(source)} {project.address(target)} {said}"


def edge(project: Project) -> list[str]:
    """Hosts where the edge runs; where its label is must be the same."""
    found = [host for host in HOSTS if container(project, host, "mail_edge")]
    eventually(lambda: sorted(labelled(project, "swarmmail.edge")) == found, 20, "it runs where its label is")
    return found


def greets(project: Project, host: str) -> bool:
    try:
        imaplib.IMAP4_SSL(project.address(host), 993, ssl_context=trusting(project), timeout=20).shutdown()
    except (OSError, imaplib.IMAP4.error):
        return False
    return True


def test_the_edge_there_and_back(mailing: Project) -> None:
    """At every moment it answers on one of the two hosts. Afterwards people are served at its new one, deploy leaves it
    there and updates it there."""
    with_hook(mailing)
    assert edge(mailing) == ["host1"]
    before = versions(mailing), labelled(mailing, "swarmmail.edge")
    shown = migrate(mailing, "host2", "--plan", service="edge", check=0).stdout
    assert "move edge from host1 to host2: it has no data, and answers on host2 before it ends on host1\n" in shown
    assert "hook will be run to make the name that mail programs use lead to" in shown
    assert re.findall(r"^\+ (\w+): ", shown, re.M) == ["prepare", "standby", "serve", "address", "tidy", "after"]
    only = migrate(mailing, "host2", "--check-only", service="edge", check=0).stdout
    assert only == "migrate: edge from host1 to host2 can be done\n"
    assert (versions(mailing), labelled(mailing, "swarmmail.edge")) == before and edge(mailing) == ["host1"]

    with Probe(lambda: greets(mailing, "host1") or greets(mailing, "host2")) as probe:
        there = migrate(mailing, "host2", "--times", service="edge", check=0)
    assert probe.bad == 0 and probe.good
    assert re.search(r"^migrate: edge is on host2$", there.stdout, re.M), str(there)
    assert f"people read their mail at host2 ({mailing.address('host2')}) now" in there.stdout
    assert any(event.startswith("the public address moves, too: ") for event in there.events)
    assert told(mailing) == [call(mailing, "edge", "host1", "host2", "*")] and edge(mailing) == ["host2"]
    token = send(mailing, USERS[0])
    arrives(mailing, USERS[0], PASSWORD, token, host="host2")

    again = deploy(mailing, check=0)
    assert again.stdout == "deploy: nothing to do\n"
    assert any(e.startswith("edge stays on host2 (the inventory begins it on host1)") for e in again.events), str(again)
    assert mailing.fab("plan", "--inventory", MAIL, check=0).stdout == "plan: nothing to do\n"
    assert "edge     host2" in mailing.fab("status", "--inventory", MAIL, check=0).stdout
    name = variant(mailing, "edge", {"edge/haproxy.cfg": replaced("maxconn 4000", "maxconn 4001")})
    was = container(mailing, "host2", "mail_edge")
    assert "+ update service mail_edge\n    image: " in deploy(mailing, inventory=name, check=0).stdout
    assert edge(mailing) == ["host2"] and container(mailing, "host2", "mail_edge") != was
    healed(mailing)

    assert "migrate: edge is on host1\n" in migrate(mailing, "host1", service="edge", check=0).stdout
    assert told(mailing)[1:] == [call(mailing, "edge", "host2", "host1", "*")] and edge(mailing) == ["host1"]
    done = migrate(mailing, "host1", service="edge", check=0)
    assert done.stdout == "migrate: edge is on host1 already, nothing to do\n" and len(told(mailing)) == 2
    clean(mailing)
    again = deploy(mailing, check=0)
    assert again.stdout == "deploy: nothing to do\n" and "edge stays" not in again.output


def test_an_address_hook_that_fails(mailing: Project) -> None:
    """The move stands; what is to be done by hand is the last word; nothing is left half done."""
    with_hook(mailing, '#!/bin/sh\necho "$*" >>"${0%/*}/told"\necho no quota >&2\nexit 3\n')
    result = migrate(mailing, "host2", service="edge")
    assert result.status == 1 and "migrate: edge is on host2\n" in result.stdout, str(result)
    warned, said = result.errors
    assert warned == (
        "warning: address hook: hook: exit status 3: no quota; "
        "the move goes on, and the hook is run once more at its end"
    )
    by_hand = call(mailing, "edge", "host1", "host2", "").strip()
    assert said.startswith("host2, address hook: hook: exit status 3: no quota -> make the name that mail programs use")
    assert said.endswith(f"by hand, or mend it and run: {mailing.root}/address/hook {by_hand}"), said
    assert told(mailing) == [by_hand] * 2 and edge(mailing) == ["host2"]
    assert mailing.fab("migrate.status", "--inventory", MAIL, check=0).stdout == "no move is under way\n"
    resumed = mailing.fab("migrate.resume", "--inventory", MAIL, check=0).stdout
    assert resumed == "migrate: no move is under way, nothing to do\n"
    already = migrate(mailing, "host2", service="edge", check=0).stdout
    assert already == "migrate: edge is on host2 already, nothing to do\n"
    (mailing.root / "address" / "hook").chmod(0o644)
    refused = migrate(mailing, "host1", service="edge").errors
    assert len(refused) == 1 and re.search(r"mail\.yml:\d+: stack\.address_hook: .* is not executable", refused[0])
    with_hook(mailing)
    migrate(mailing, "host1", service="edge", check=0)
    assert edge(mailing) == ["host1"]


def test_a_killed_move_of_the_edge(mailing: Project) -> None:
    """Whatever comes next ends it well. A hook that was run may be run again."""
    with_hook(mailing)
    nexts = (
        ("prepare", "the same"),
        ("prepare", "abort"),
        ("standby", "resume"),
        ("address", "abort"),
        ("tidy", "resume"),
    )
    for after, how in nexts:
        [source] = edge(mailing)
        target = "host2" if source == "host1" else "host1"
        process = mailing.start("migrate", "--service", "edge", "--to", target, "--inventory", MAIL, "--no-verify")
        assert process.stderr is not None
        for line in process.stderr:
            if f" s  {after}: " in line:
                break
        process.kill()
        mailing.finish(process)
        assert greets(mailing, source) or greets(mailing, target)
        if has_begun(mailing):  # it may have been quicker
            deploy(mailing).error("a service is being moved, or its move was interrupted")
            refused = migrate(mailing, other(place(mailing)))
            assert f"a move of edge from {source} to {target} was interrupted" in refused.errors[-1], str(refused)
            finish(mailing, target, how, service="edge")
        assert edge(mailing) in ([target], [source] if how == "abort" else [target])
        clean(mailing)
        assert mailing.fab("probe", "--inventory", MAIL, check=0)
    if edge(mailing) != ["host1"]:
        migrate(mailing, "host1", service="edge", check=0)


def test_an_edge_that_does_not_come_up_there_stays_where_it_is(mailing: Project) -> None:
    was = container(mailing, "host1", "mail_edge")
    node = "$(docker node ls -qf node.label=swarmmail.host=host2)"
    # a port that is had, although nobody listens: no check sees it
    program = "import socket, time; s = socket.socket(); s.bind(('', 143)); time.sleep(600)"
    mailing.sh("host2", f'systemd-run -q --unit taken python3 -c "{program}"')
    try:
        result = migrate(mailing, "host2", service="edge")
        result.error("host2, standby: edge was not up there within 60 s; it stays on host1", "docker service ps")
        assert edge(mailing) == ["host1"] and container(mailing, "host1", "mail_edge") == was
        mailing.sh("host1", f"docker node update --availability drain {node}")
        migrate(mailing, "host2", service="edge").error("host2 is ready and drain in the Swarm")
    finally:
        mailing.sh("host2", "systemctl stop taken")
        mailing.sh("host1", f"docker node update --availability active {node}")
    clean(mailing)


def test_an_edge_whose_host_is_lost(mailing: Project) -> None:
    """It has no data: nothing is needed of that host, the image comes from where it was built. When the host is back,
    the edge does not come to life there again."""
    if place(mailing) == "host2":
        migrate(mailing, "host3", check=0)  # an edge without the MDA behind it would greet nobody
    migrate(mailing, "host2", service="edge", check=0)
    mailing.stop("host2")
    with_hook(mailing)
    try:
        managed = "docker node ls -q >/dev/null 2>&1 && echo yes"
        eventually(lambda: mailing.sh("host1", managed, check=False) == "yes\n", 60, "the Swarm has its leader")
        mailing.sh("host3", "docker rmi -f $(docker images -q swarmmail/edge) >/dev/null 2>&1; true")
        result = migrate(mailing, "host3", service="edge", check=0)
        assert "migrate: edge is on host3\n" in result.stdout
        assert any(event.startswith("host3: image") for event in result.events), str(result)
        assert told(mailing) == [call(mailing, "edge", "host2", "host3", "*")]
        token = send(mailing, USERS[0])
        arrives(mailing, USERS[0], PASSWORD, token, host="host3")
    finally:
        mailing.up(3)
    eventually(lambda: mailing.bootstrap(MAIL, timeout=240).status == 0, 120, "the cluster is whole again")
    eventually(lambda: edge(mailing) == ["host3"], 60, "it runs on host3 only")
    migrate(mailing, "host1", service="edge", check=0)
    healed(mailing)


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
        mailing.sh(
            "host1",
            "for n in $(docker node ls -q); do docker node update --label-rm swarmmail.extra $n; done",
            check=False,
        )


def is_down(project: Project, host: str) -> bool:
    """As the Swarm sees it; a manager that elects a leader with the others answers later."""
    try:
        [node] = [n for n in project.host("host1").docker.nodes() if n["Spec"]["Labels"]["swarmmail.host"] == host]
    except docker.errors.APIError:
        return False
    return bool(node["Status"]["State"] == "down")


@contextmanager
def lost_host(project: Project, host: str) -> Iterator[None]:
    """For a while there is no such host, and the Swarm has seen it; afterwards the cluster is whole again."""
    project.stop(host)
    try:
        eventually(lambda: is_down(project, host), 60, "the Swarm sees it")
        yield
    finally:
        project.up(3)
    # a manager that comes back may cause an election
    eventually(lambda: project.bootstrap(MAIL, timeout=240).status == 0, 120, "the cluster is whole again")


def test_a_lost_source(mailing: Project) -> None:
    """The host of the MDA is gone. With a yes an older copy lives, and the lost one never again."""
    source = place(mailing)
    target = other(source)
    migrate(mailing, target, check=0)  # so that there is a copy on `source`, of this moment
    words = ("migrate", "--service", "mda", "--to", source, "--source-is-dead", "--no-verify", "--inventory", MAIL)
    mailing.fab(*words).error("check", "it is not dead, and its data is newer")
    with lost_host(mailing, target):
        mailing.fab(*words).error("check", r"the copy on \w+ is of \d{4}-\d\d-\d\d .* is lost")
        result = mailing.fab(*words, "--yes", check=0, timeout=240)
        assert f"migrate: mda is on {source}" in result.stdout
        token = send(mailing, USERS[0])
        arrives(mailing, USERS[0], PASSWORD, token)
    time.sleep(3)
    assert not container(mailing, target, "mail_mda") and labelled(mailing) == [source]
    assert f"removed {target}: volume mail_mail" in mailing.fab("migrate.purge", "--inventory", MAIL, check=0).stdout
    healed(mailing)


@pytest.mark.parametrize("step", ["standby", "cutover"])
def test_a_host_that_is_lost_in_the_middle_of_a_move(mailing: Project, step: str) -> None:
    """The run is killed after a step, and the host that has the data never comes back: not finished, not undone."""
    source = place(mailing)
    target = other(source)
    lost, left = (target, source) if step == "cutover" else (source, target)
    process = mailing.start("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, "--no-verify")
    assert process.stderr is not None
    assert any(f" s  {step}: " in line for line in process.stderr)
    process.kill()
    mailing.finish(process)
    assert has_begun(mailing)
    words = ("migrate", "--service", "mda", "--to", left, "--source-is-dead", "--no-verify", "--inventory", MAIL)
    with lost_host(mailing, lost):
        resumed = mailing.fab("migrate.resume", "--inventory", MAIL, timeout=240)
        assert resumed.status == 1, str(resumed)
        again = f"if {lost} is lost for good: fab migrate --service mda --to {left} --source-is-dead"
        assert again in resumed.stderr, str(resumed)
        mailing.fab(*words).error("check", rf"was interrupted in phase '\w+', and {lost} does not answer: ", "--yes")
        assert has_begun(mailing), "nothing was done without a yes"
        result = mailing.fab(*words, "--yes", check=0, timeout=240)
        assert f"migrate: mda is on {left}" in result.stdout, str(result)
        token = send(mailing, USERS[0])
        arrives(mailing, USERS[0], PASSWORD, token)
    time.sleep(3)
    assert not container(mailing, lost, "mail_mda") and labelled(mailing) == [left]
    mailing.fab("migrate.purge", "--inventory", MAIL, check=0)
    clean(mailing)
    healed(mailing)


def test_a_lost_mta(mailing: Project) -> None:
    """Likewise; what its queue held is lost, and the public address follows to where the world finds an MTA again."""
    with_hook(mailing)
    if place(mailing) == "host2":
        migrate(mailing, "host3", check=0)
    migrate(mailing, "host2", service="mta", check=0)
    words = ("--service", "mta", "--to", "host1", "--source-is-dead", "--yes", "--no-verify", "--inventory", MAIL)
    with lost_host(mailing, "host2"):
        result = mailing.fab("migrate", *words, check=0, timeout=240)
        assert "migrate: mta is on host1" in result.stdout
        ways = (("host1", "host2"), ("host2", "host1"))
        assert told(mailing) == [call(mailing, "mta", *way, "220") for way in ways]
        token = send(mailing, USERS[0])
        arrives(mailing, USERS[0], PASSWORD, token)
    assert not container(mailing, "host2", "mail_mta") and labelled(mailing, "swarmmail.mta") == ["host1"]
    assert "removed host2: volume mail_queue" in mailing.fab("migrate.purge", "--inventory", MAIL, check=0).stdout
    healed(mailing)
