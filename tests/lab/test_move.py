"""Moves under mail: nothing lost, never two writers, and one of two good ends whatever went wrong.

``SWARMMAIL_KILLS`` runs (default 4) are killed, in ``SWARMMAIL_FAULTS`` (default 3) something else goes wrong, drawn at
random; ``SWARMMAIL_SEED`` chooses another sequence of them. ``tests/bench/soak.py`` draws many more.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator, Sequence

import pytest
from conftest import HOSTS, MAIL, STACK, Project, eventually
from mailing import PASSWORD, arrives, container, deploy, healed, mark, marker, queue, send, variant, volume
from moving import (
    FAULTS,
    KILLED,
    NO_PROOF,
    READER,
    USERS,
    accounts_for,
    clean,
    go_wrong,
    has_begun,
    labelled,
    migrate,
    other,
    place,
)
from stream import Clients, Stream, Watch, lmtp_probe, longest

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
    mta = mailing.sh("host1", f"docker inspect -f '{{{{.State.Pid}}}}' {container(mailing, 'host1', 'mail_mta')}")
    inside = f"nsenter -t {mta.strip()} -n nft"
    address = mailing.sh("host1", f"docker exec {container(mailing, 'host1', 'mail_mta')} getent ahostsv4 mda").split()
    rules = "{ type filter hook output priority 0; }"
    mailing.sh("host1", f"{inside} add table inet planted; {inside} 'add chain inet planted out {rules}'")
    mailing.sh("host1", f"{inside} add rule inet planted out ip daddr {address[0]} drop")
    try:
        result = migrate(mailing, target, check=0)
        [away] = re.findall(r"it was away (\d+\.\d+) s", result.stdout)
        assert float(away) < 15, str(result)
    finally:
        mailing.sh("host1", f"{inside} delete table inet planted")
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


def test_a_target_that_does_not_serve_is_said_and_can_be_left(mailing: Project) -> None:
    """The data is there and LMTP is not: nothing may start on the source any more, and moving back is a move."""
    source = place(mailing)
    target = other(source)
    process = mailing.start("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF)
    assert process.stderr is not None
    for line in process.stderr:
        if " s  standby: " in line:
            break
    task = container(mailing, target, "mail_mda")
    inside = f"nsenter -t $(docker inspect -f '{{{{.State.Pid}}}}' {task}) -n nft"
    rules = "{ type filter hook input priority 0; }"
    mailing.sh(target, f"{inside} add table inet planted; {inside} 'add chain inet planted in {rules}'")
    mailing.sh(target, f"{inside} add rule inet planted in iifname != lo tcp dport 24 drop")
    said = mailing.finish(process, 300)
    said.error(target, "has its data on .* and does not answer: no LMTP greeting within 20 s")
    assert place(mailing) == target
    clean(mailing)
    mailing.sh(target, f"{inside} delete table inet planted")
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
    """Mails that are deferred: each arrives once, under the id that it had, through the MTA on its new host."""
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


def test_a_lost_source(mailing: Project) -> None:
    """The host of the MDA is gone. With a yes an older copy lives, and the lost one never again."""
    source = place(mailing)
    target = other(source)
    migrate(mailing, target, check=0)  # so that there is a copy on `source`, of this moment
    words = ("migrate", "--service", "mda", "--to", source, "--source-is-dead", "--no-verify", "--inventory", MAIL)
    mailing.fab(*words).error("check", "it is not dead, and its data is newer")
    mailing.stop(target)
    try:
        api = mailing.host("host1").docker

        def down() -> bool:
            return any(
                n["Spec"]["Labels"]["swarmmail.host"] == target and n["Status"]["State"] == "down" for n in api.nodes()
            )

        eventually(down, 60, "the Swarm sees it")
        mailing.fab(*words).error("check", r"the copy on \w+ is of \d{4}-\d\d-\d\d .* is lost")
        result = mailing.fab(*words, "--yes", check=0, timeout=240)
        assert f"migrate: mda is on {source}" in result.stdout
        token = send(mailing, USERS[0])
        arrives(mailing, USERS[0], PASSWORD, token)
    finally:
        mailing.up(3)
    # a manager that comes back may cause an election
    eventually(lambda: mailing.bootstrap(MAIL, timeout=240).status == 0, 120, "the cluster is whole again")
    time.sleep(3)
    assert not container(mailing, target, "mail_mda") and labelled(mailing) == [source]
    assert f"removed {target}: volume mail_mail" in mailing.fab("migrate.purge", "--inventory", MAIL, check=0).stdout
    healed(mailing)
