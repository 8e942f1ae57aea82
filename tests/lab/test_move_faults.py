"""What goes wrong in a move: nothing lost, never two writers, and one of two good ends.

``SWARMMAIL_KILLS`` runs (default 4) are killed, in ``SWARMMAIL_FAULTS`` (default 3) something else goes wrong, drawn at
random; ``SWARMMAIL_SEED`` chooses another sequence of them. ``tests/bench/soak.py`` draws many more.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Sequence

import pytest
from conftest import MAIL, Project, eventually
from mailing import PASSWORD, arrives, container, healed, mark, send, volume
from moving import (
    FAULTS,
    KILLED,
    NO_PROOF,
    USERS,
    call,
    clean,
    go_wrong,
    has_begun,
    labelled,
    lost_host,
    migrate,
    other,
    place,
    planted,
    told,
    wait_for,
    with_hook,
)
from stream import Stream, Watch

from swarmmail.cluster import swarm

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("back_to_the_beginning")]


SEED = int(os.environ.get("SWARMMAIL_SEED", "20261125"))
KILLS = int(os.environ.get("SWARMMAIL_KILLS", "4"))
OTHERS = int(os.environ.get("SWARMMAIL_FAULTS", "3"))


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


def test_a_target_that_does_not_serve_is_said_and_can_be_left(mailing: Project) -> None:
    """The data is there and LMTP is not: nothing may start on the source any more, and moving back is a move."""
    source = place(mailing)
    target = other(source)
    process = mailing.start("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF)
    wait_for(process, " s  standby: ")
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
    wait_for(process, f" s  {step}: ")
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
