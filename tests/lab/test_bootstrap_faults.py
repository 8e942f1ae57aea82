"""What goes wrong around a bootstrap: each ends in one clear line, and a later run completes the cluster.
``SWARMMAIL_KILLS`` runs (default 5) are killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from conftest import CLUSTER, HOSTS, Project

pytestmark = pytest.mark.lab

KILLS = int(os.environ.get("SWARMMAIL_KILLS", "5"))
SEED = 20261125


def good(project: Project) -> None:
    """A normal run completes, and the next one has nothing to do."""
    project.bootstrap(CLUSTER, check=0)
    assert project.bootstrap(CLUSTER, check=0).stdout == "bootstrap: nothing to do\n"


def variant(project: Project, name: str, host: str = "host2", **different: object) -> str:
    return project.inventory(name, {h: different if h == host else {} for h in HOSTS}, ssh={"connect_timeout": 3})


# ---- SSH ----


def test_a_host_that_is_off_is_named(fresh: Project) -> None:
    fresh.inventory(CLUSTER, ssh={"connect_timeout": 3})
    fresh.stop("host2")
    try:
        fresh.bootstrap(CLUSTER).error("host2, ssh: ", "try: ssh ")
    finally:
        fresh.up(3)
    good(fresh)


def test_a_key_that_is_not_let_in(clustered: Project, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    name = variant(clustered, "wrong-key", key=str(tmp_path / "other"))
    clustered.bootstrap(name).error("host2, ssh: user root was not let in", "try: ssh ")


def test_an_unknown_and_a_changed_host_key(clustered: Project, tmp_path: Path) -> None:
    known = (clustered.root / ".lab" / "known_hosts").read_text().splitlines()
    lines = {host: next(line for line in known if clustered.address(host) in line) for host in HOSTS}
    unknown, changed = tmp_path / "unknown", tmp_path / "changed"
    unknown.write_text("\n".join(line for host, line in lines.items() if host != "host2") + "\n")
    other_key = lines["host3"].split(maxsplit=1)[1]
    changed.write_text("\n".join([lines["host1"], f"{lines['host2'].split()[0]} {other_key}", lines["host3"]]) + "\n")
    name = variant(clustered, "unknown", known_hosts=str(unknown))
    clustered.bootstrap(name).error("host2, ssh: host key is not known", "SHA256:")
    name = variant(clustered, "changed", known_hosts=str(changed))
    clustered.bootstrap(name).error("host2, ssh: host key has CHANGED", str(changed))


def test_a_user_without_the_right_to_be_root(clustered: Project) -> None:
    clustered.sh(
        "host2",
        "id plain >/dev/null 2>&1 || useradd -m plain; cp -r /root/.ssh /home/plain/; chown -R plain: /home/plain/.ssh",
    )
    name = variant(clustered, "plain", user="plain")
    clustered.bootstrap(name).error("host2, sudo: ", "--prompt-for-sudo-password")
    good(clustered)


# ---- the inventory ----


def test_the_same_host_twice_and_other_mistakes_all_at_once(lab: Project) -> None:
    name = lab.inventory(
        "wrong", {"host1": {}, "host2": {"address": lab.address("host1")}, "host3": {"role": "manger"}}
    )
    result = lab.bootstrap(name)
    assert result.status == 1 and "Traceback" not in result.stderr
    assert "hosts.host2" in result.stderr and "did you mean 'manager'?" in result.stderr, str(result)
    assert all(line.startswith("inventories/wrong.yml:") for line in result.stderr.splitlines()), str(result)


# ---- other Swarms ----


@pytest.mark.parametrize("as_worker", [False, True], ids=["manager", "worker"])
def test_a_host_in_another_swarm_is_left_alone(fresh: Project, as_worker: bool) -> None:
    foreign = "host2"
    fresh.sh("host3", f"docker swarm init --advertise-addr {fresh.address('host3')}")
    if as_worker:
        token = fresh.sh("host3", "docker swarm join-token -q worker").strip()
        fresh.sh(foreign, f"docker swarm join --token {token} {fresh.address('host3')}:2377")
        name = fresh.inventory("two", ["host1", "host2"], managers=1)
        # host3 is no host of ours: host2's Swarm is somebody else's
        fresh.bootstrap(name).error("host2, bootstrap: belongs to another swarm", "docker swarm leave")
        assert "active" in fresh.sh(foreign, "docker info -f '{{.Swarm.LocalNodeState}}'")
    else:
        fresh.bootstrap(fresh.inventory(CLUSTER)).error(
            "host3, bootstrap: is a manager of a swarm", "docker swarm leave"
        )
        assert "true" in fresh.sh("host3", "docker info -f '{{.Swarm.ControlAvailable}}'")
    for host in (foreign, "host3"):
        fresh.sh(host, "docker swarm leave --force", check=False)
    fresh.reset()
    fresh.inventory(CLUSTER)
    good(fresh)


def test_a_network_of_the_name_with_other_options_is_refused(clustered: Project) -> None:
    clustered.sh(
        "host1", "docker network rm local-mail-delivery && docker network create -d overlay local-mail-delivery"
    )
    clustered.bootstrap(CLUSTER).error("overlay local-mail-delivery differs", "docker network rm local-mail-delivery")
    clustered.sh("host1", "docker network rm local-mail-delivery")
    good(clustered)


def test_ipsec_is_refused_where_the_kernel_has_none(fresh: Project) -> None:
    name = fresh.inventory("ipsec", network={"encryption": "ipsec"})
    fresh.bootstrap(name).error("network.encryption: ipsec: the kernel does not accept an ESP state", "wireguard")


# ---- killed, and two at once ----


@pytest.mark.timeout(1800)
def test_killed_at_any_moment_the_second_run_completes_it(fresh: Project) -> None:
    """SIGKILL at seeded moments, each from clean hosts; then one run must do the rest."""
    chance = random.Random(SEED)  # noqa: S311 - moments, not secrets
    fresh.inventory(CLUSTER)
    for number in range(KILLS):
        fresh.reset()
        process = fresh.start("bootstrap", "--inventory", CLUSTER)
        moment = chance.uniform(0.4, 4.5)
        time.sleep(moment)
        process.kill()
        process.communicate()
        result = fresh.bootstrap(CLUSTER)
        assert result.status == 0, f"kill {number} after {moment:.2f} s\n{result}"
        again = fresh.bootstrap(CLUSTER)
        assert again.stdout == "bootstrap: nothing to do\n", f"kill {number} after {moment:.2f} s\n{again}"


def test_two_operators_at_once(fresh: Project) -> None:
    fresh.inventory(CLUSTER)
    first, second = (fresh.start("bootstrap", "--inventory", CLUSTER) for _ in range(2))
    results = [fresh.finish(process) for process in (first, second)]
    statuses = sorted(result.status for result in results)
    assert statuses[0] == 0, "\n".join(map(str, results))
    for result in results:
        if result.status != 0:
            assert "has been at work on 'bootstrap'" in result.stderr or "taken the lock" in result.stderr, str(result)
            assert "fab lock.break" in result.stderr
    good(fresh)


def test_the_lock_of_another_machine_is_explained_and_broken_by_hand_only(clustered: Project) -> None:
    owner = {
        "user": "eve",
        "machine": "elsewhere",
        "boot": "x",
        "pid": 1,
        "started": "1",
        "task": "bootstrap",
        "since": time.time() - 600,
        "token": "t",
    }
    clustered.sh("host2", "docker node update --label-rm swarmmail.host host2")
    clustered.sh("host1", f"docker config create swarmmail-lock - <<'EOF'\n{json.dumps(owner)}\nEOF")
    clustered.bootstrap(CLUSTER).error("eve@elsewhere .*has been at work on 'bootstrap' for 10 min", "lock.break")
    shown = clustered.fab("lock.status", "--inventory", CLUSTER, check=0).stdout
    assert "eve@elsewhere" in shown
    clustered.fab("lock.break", "--inventory", CLUSTER, check=0)
    good(clustered)


def test_the_lock_of_a_run_that_died_here_is_taken_over_and_said(clustered: Project) -> None:
    clustered.sh("host2", "docker node update --label-rm swarmmail.host host2")
    process = clustered.start("bootstrap", "--inventory", CLUSTER)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    good(clustered)
