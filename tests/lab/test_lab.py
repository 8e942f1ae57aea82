"""``lab.up``, ``lab.status``, ``lab.down``: real hosts on this machine."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Project, eventually, temporary

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def other(place: Path) -> Iterator[Project]:
    """A lab of two hosts that these tests may treat badly."""
    with temporary(place, "other") as project:
        project.fab("lab.up", "--hosts", "2", check=0)
        yield project


def docker(*words: str) -> list[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.split()


def traces(project: Project) -> list[str]:
    """Everything on this machine's Docker that belongs to the lab, by name and not by label."""
    name = project.container("").rstrip("-")
    return [
        *docker("ps", "-aq", "--filter", f"name={name}"),
        *docker("volume", "ls", "-q", "--filter", f"name={name}"),
        *docker("network", "ls", "-q", "--filter", f"name={name}"),
    ]


def started(project: Project, *hosts: str) -> list[str]:
    """Id and start time of each host's container."""
    return docker("inspect", "-f", "{{.Id}},{{.State.StartedAt}}", *map(project.container, hosts))


def test_hosts_are_machines_with_systemd_ssh_and_a_docker_of_their_own(other: Project) -> None:
    engines = set()
    for name in ("host1", "host2"):
        host = other.host(name)
        assert host.run("cat /proc/1/comm").stdout == "systemd\n"
        assert host.run("systemctl is-system-running").stdout == "running\n"
        assert host.run("hostname").stdout == f"{name}\n"
        info = host.docker.info()
        assert info["Driver"] == "overlay2"
        engines.add(info["ID"])
    assert len(engines) == 2
    # no --privileged: what a mistake on a host could break on the machine stays out of reach
    assert other.sh("host1", "date -s 2000-01-01 >/dev/null 2>&1 || echo refused") == "refused\n"


def test_hosts_reach_each_other_and_a_container_on_a_host_works(other: Project) -> None:
    other.sh("host1", f"ping -c1 -W2 {other.address('host2')}")
    assert other.sh("host1", f"docker run --rm {other.image('host1')} echo works") == "works\n"


def test_up_again_changes_nothing(other: Project) -> None:
    before = started(other, "host1", "host2")
    inventory = (other.root / "inventories" / "lab.yml").read_text()
    result = other.fab("lab.up", "--hosts", "2", check=0)
    assert "lab is up already, nothing changed" in result.stdout
    assert started(other, "host1", "host2") == before
    assert (other.root / "inventories" / "lab.yml").read_text() == inventory


def test_up_from_a_folder_below_is_the_same_lab(other: Project) -> None:
    command = ["sh", "-c", f"cd {other.root}/stacks && exec $0 -m fabric lab.status --json", sys.executable]
    done = subprocess.run(command, env=other.environment(), capture_output=True, text=True, check=True)
    assert [host["name"] for host in json.loads(done.stdout)["hosts"]] == ["host1", "host2"]


def test_up_completes_a_lab_and_keeps_what_is_there(other: Project) -> None:
    other.sh("host2", "echo data >/var/lib/docker/kept; echo mine >/root/kept")
    key = other.sh("host2", "cat /etc/ssh/ssh_host_ed25519_key.pub")
    before = started(other, "host1")
    other.stop("host2")
    assert "exited" in other.fab("lab.status", check=0).stdout
    result = other.fab("lab.up", "--hosts", "2", check=0)
    assert "host2" in result.stdout.splitlines()[-1] and "host1" not in result.stdout.splitlines()[-1]
    assert started(other, "host1") == before
    assert other.sh("host2", "cat /var/lib/docker/kept /root/kept") == "data\nmine\n"
    assert other.sh("host2", "cat /etc/ssh/ssh_host_ed25519_key.pub") == key


def test_a_host_that_reboots_itself_comes_back(other: Project) -> None:
    before = started(other, "host1")
    other.sh("host1", "echo here >/root/before-reboot; reboot", check=False)
    eventually(lambda: started(other, "host1") != before, 30, "host1 starts anew")
    other.disconnect()
    assert "lab is up already, nothing changed" in other.fab("lab.up", "--hosts", "2", check=0).stdout
    assert other.host("host1").run("cat /root/before-reboot").stdout == "here\n"


def test_cuts_take_what_they_say_and_leave_the_rest(other: Project) -> None:
    def reaches(host: str, target: str) -> bool:
        words = f"ping -c1 -W1 {other.address(target)} >/dev/null && echo yes"
        return other.sh(host, words, check=False) == "yes\n"

    def connects(host: str) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((other.address(host), 22), timeout=1):
            return True
        return False

    other.fab("lab.cut", "--between", "host1,host2", "--only", "icmp", "--one-way", check=0)
    assert not reaches("host1", "host2") and not reaches("host2", "host1")  # the way there, or the answer's
    assert (
        other.sh("host1", f"python3 -c 'import socket; socket.create_connection((\"{other.address('host2')}\", 22))'")
        == ""
    )
    assert "cut: host1 to host2: icmp" in other.fab("lab.status", check=0).stdout
    assert "mended: host1 to host2: icmp" in other.fab("lab.mend", check=0).stdout
    assert reaches("host1", "host2")
    other.fab("lab.cut", "--host", "host2", check=0)
    assert not reaches("host1", "host2") and not connects("host2") and connects("host1")
    other.fab("lab.mend", check=0)
    assert reaches("host1", "host2") and connects("host2")
    assert other.fab("lab.mend", check=0).stdout == "nothing was cut\n"


def test_what_container_hosts_do_not_have_is_said(other: Project) -> None:
    for words in (
        ["lab.clock", "--host", "host1", "--by", "2h"],
        ["lab.module", "--host", "host1", "--forbid", "esp4"],
    ):
        other.fab(*words, check=1)
    assert "no host host9 in the lab, there are: host1, host2" in other.fab("lab.cut", "--host", "host9").stderr
    assert "is of driver container, asked for is vm" in other.fab("lab.up", "--driver", "vm").stderr


def test_power(other: Project) -> None:
    other.fab("lab.power", "off", "--host", "host2", check=0)
    assert {machine.name: machine.state for machine in other.machines} == {"host1": "running", "host2": "exited"}
    other.fab("lab.power", "on", "--host", "host2", check=0)
    other.fab("lab.power", "reset", "--host", "host2", check=0)
    assert [machine.state for machine in other.machines] == ["running", "running"]


def test_secrets_are_for_the_owner_only(other: Project) -> None:
    folder = other.root / ".lab"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_status_as_json_and_without_a_lab(other: Project, make_project: Callable[[str], Project]) -> None:
    report = json.loads(other.fab("lab.status", "--json", check=0).stdout)
    assert [(host["name"], host["state"]) for host in report["hosts"]] == [("host1", "running"), ("host2", "running")]

    def weighed() -> bool:  # a host that has just started may not know yet
        hosts = json.loads(other.fab("lab.status", "--json", check=0).stdout)["hosts"]
        return all(10e6 < (host["memory"] or 0) < 500e6 for host in hosts)

    eventually(weighed, 60, "every host has its memory shown")
    assert "no lab here" in make_project("none").fab("lab.status", check=0).stdout


def test_two_labs_at_once_do_not_meet(other: Project, make_project: Callable[[str], Project]) -> None:
    second = make_project("second")
    before = started(other, "host1", "host2")
    second.fab("lab.up", "--hosts", "1", check=0)
    assert second.gateway != other.gateway
    second.fab("lab.down", check=0)
    assert started(other, "host1", "host2") == before
    assert other.host("host1").run("echo fine").stdout == "fine\n"


def test_two_ups_at_once_in_one_folder(make_project: Callable[[str], Project]) -> None:
    project = make_project("rush")
    first, second = project.start("lab.up", "--hosts", "1"), project.start("lab.up", "--hosts", "1")
    results = sorted((project.finish(first), project.finish(second)), key=lambda result: result.status)
    assert results[0].status == 0, str(results[0])
    if results[1].status:  # else one was over before the other began
        assert results[1].errors == ["lab: another lab.up or lab.down is at work in this folder"]
    assert len(project.machines) == 1


def test_a_killed_up_is_completed_and_a_killed_down_too(make_project: Callable[[str], Project]) -> None:
    """SIGKILL at times spread over the whole run of each."""
    project = make_project("killed")
    chance = random.Random(2)  # noqa: S311
    for _ in range(3):
        going = project.start("lab.up", "--hosts", "2")
        time.sleep(chance.uniform(0.4, 3.0))
        going.kill()
        going.communicate()
        result = project.fab("lab.up", "--hosts", "2", check=0)
        assert [machine.state for machine in project.machines] == ["running", "running"], str(result)
        assert project.host("host2").run("docker info >/dev/null && echo fine").stdout == "fine\n"
        going = project.start("lab.down")
        time.sleep(chance.uniform(0.3, 1.2))
        going.kill()
        going.communicate()
        project.disconnect()
    project.fab("lab.down", check=0)
    assert traces(project) == []


def test_down_leaves_nothing_behind(make_project: Callable[[str], Project]) -> None:
    project = make_project("gone")
    project.fab("lab.up", "--hosts", "1", "--bare", "1", check=0)
    assert traces(project)
    assert project.sh("bare1", "command -v docker wg rsync || echo bare") == "bare\n"
    bridge = project.bridge
    result = project.fab("lab.down", check=0)
    assert result.stdout == "the lab is gone\n"
    assert traces(project) == []
    assert not (Path("/sys/class/net") / bridge).exists()
    assert not (project.root / ".lab").exists() and not (project.root / "inventories" / "lab.yml").exists()
    assert "there was no lab" in project.fab("lab.down", check=0).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--hosts", "0"), "hosts: 0, allowed are 1 to 40"),
        (("--hosts", "41"), "hosts: 41, allowed are 1 to 40"),
        (("--bare", "10"), "bare: 10, allowed are 0 to 9"),
    ],
)
def test_up_refuses_impossible_numbers(make_project: Callable[[str], Project], words: tuple[str], says: str) -> None:
    project = make_project(f"numbers{words[0]}{words[1]}")
    result = project.fab("lab.up", *words)
    assert result.status == 1 and result.errors == [says], str(result)
    assert traces(project) == [] and not (project.root / ".lab").exists()


def test_no_docker_is_one_line(make_project: Callable[[str], Project]) -> None:
    result = make_project("without").fab("lab.up", env={"DOCKER_HOST": "unix:///nowhere/docker.sock"})
    assert result.status == 1
    result.error("lab: no Docker answers on this machine", "systemctl start docker")
