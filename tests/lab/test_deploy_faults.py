"""``deploy`` when something is wrong: bad input, a port in use, images that cannot start, volumes that are not what
they should be, runs that are killed, two operators. Each ends in one clear line and a stack that a later deploy
completes. ``SWARMMAIL_KILLS`` runs (default 5) are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
from conftest import HOSTS, MAIL, STACK, Project, Result, deploy_all, eventually
from mailing import (
    DONE,
    Edit,
    account,
    accounts,
    arrives,
    container,
    deploy,
    healed,
    mark,
    marker,
    replaced,
    running,
    send,
    services,
    undeploy,
    variant,
    versions,
    volume,
)

from swarmmail.cluster import lock

pytestmark = pytest.mark.lab

KILLS = int(os.environ.get("SWARMMAIL_KILLS", "5"))


def sentence(result: Result, *parts: str) -> None:
    """The command failed with a line of error (more where one place in the file serves several services)."""
    assert result.status == 1, str(result)
    assert "Traceback" not in result.output and "should not happen" not in result.output, str(result)
    assert 1 <= len(result.errors) <= 3, str(result)
    assert re.search(".*".join(parts), result.errors[0]), f"{parts} not in: {result.errors[0]}"


# ---- bad input: refused before anything is touched ----


def _first(old: str, new: str) -> Edit:
    return lambda text: text.replace(old, new, 1)


MDA_VOLUMES = "    volumes:\n      - mail:/srv/mail\n"


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in STACK["placement"].items() if name != key}


@pytest.fixture(scope="module")
def standing(_hosts: Project) -> Project:
    """``deployed`` once for all tests that touch nothing."""
    return deploy_all(_hosts)


@pytest.mark.parametrize(
    ("edit", "section", "parts"),
    [
        (_first("  mta:\n", "  mta: }\n"), {}, [r"stack\.yml:\d+: not YAML: column \d+"]),
        (
            _first("stop_grace_period", "stop_grace"),
            {},
            ["docker stack config on host1 says: .*stop_grace is not allowed"],
        ),
        (_first("mode: host", "mode: ingress"), {}, [r"stack\.yml:\d+: services\.mta\.ports\[?\.?0", "open relay"]),
        (
            _first(MDA_VOLUMES, "    ports: [{target: 24, published: 24, mode: host}]\n" + MDA_VOLUMES),
            {},
            [r"services\.mda\.ports", "LMTP takes mail without a password"],
        ),
        (
            _first("    cap_drop: [ALL]\n", "    cap_drop: [ALL]\n    depends_on: [mda]\n"),
            {},
            [r"stack\.yml:\d+: services\.mta\.depends_on: ", "leave it out"],
        ),
        (_first("    image: swarmmail/mda\n", ""), {}, [r"stack\.yml:\d+: services\.mda\.image: missing"]),
        (
            _first("build: ./mda", "build: ./mad"),
            {},
            [r"stack\.yml:\d+: services\.mda\.build: no file .*mad/Dockerfile"],
        ),
        (_first("      endpoint_mode: dnsrr\n", ""), {}, [r"endpoint_mode: .*write endpoint_mode: dnsrr"]),
        (
            None,
            {"settings": {"MAIL_DOMAIN": "lab.test"}},
            [r"stack\.yml:\d+: services\.mta\.environment\.MAIL_HOSTNAME: ", r"is not in stack\.settings of .*\.yml"],
        ),
        (
            None,
            {"settings": {"MAIL_DOMAIN": "lab.test", "MAIL_HOSTNAM": "mx.lab.test"}},
            ["MAIL_HOSTNAME", "did you mean 'MAIL_HOSTNAM'"],
        ),
        (None, {"placement": _without("mda")}, [r"stack\.placement: service 'mda' has data", "write mda: host1"]),
        (None, {"placement": {**STACK["placement"], "mdaa": "host1"}}, ["'mdaa' is no service", "did you mean 'mda'"]),
        (
            None,
            {"placement": {"mta": "host1", "mda": "hots3"}},
            [r"\.yml:\d+: stack\.placement\.mda: ", "did you mean 'host3'"],
        ),
        (None, {"path": "../stacks/nowhere"}, ["nowhere"]),
        (None, {"tls": None}, [r"stack\.tls: missing", "tls-certificate"]),
        (
            None,
            {"tls": {**STACK["tls"], "key": "../.lab/id_ed25519"}},
            [r"stack\.tls: tls.crt and id_ed25519 are no pair"],
        ),
    ],
    ids=[
        "YAML",
        "unknown key",
        "ingress port",
        "LMTP published",
        "depends_on",
        "no image",
        "no Dockerfile",
        "virtual address",
        "missing setting",
        "near miss of a setting",
        "no placement",
        "placement of no service",
        "placement on no host",
        "no folder",
        "no certificate",
        "foreign key",
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(
    standing: Project, edit: Edit | None, section: dict[str, Any], parts: list[str]
) -> None:
    edits = {"stack.yml": edit} if edit else None
    name = variant(standing, "bad", edits, **section)
    before = versions(standing), running(standing)
    sentence(deploy(standing, inventory=name), *parts)
    assert (versions(standing), running(standing)) == before


def test_every_problem_of_a_file_is_said_at_once(standing: Project) -> None:
    def edit(text: str) -> str:
        return text.replace("mode: host", "mode: ingress").replace("    image: swarmmail/mda\n", "")

    result = deploy(standing, inventory=variant(standing, "bad", {"stack.yml": edit}, placement={"mta": "host1"}))
    assert result.status == 1
    assert len(result.errors) == 3 + 1, str(result)  # three ports, one image


def test_before_bootstrap_it_says_so(fresh: Project) -> None:
    fresh.inventory(MAIL, stack=STACK)
    deploy(fresh).error("there is no Swarm of cluster test yet", "fab bootstrap")


def test_without_the_overlay_it_says_so(empty: Project) -> None:
    empty.sh("host1", "docker network rm local-mail-delivery")
    deploy(empty).error("there is no overlay local-mail-delivery", "fab bootstrap")


# ---- the operator's machine, and the build ----


def test_no_docker_on_the_operators_machine(deployed: Project) -> None:
    name = variant(deployed, "unbuilt", {"mta/main.cf": lambda text: text + "# never built\n"})
    result = deploy(deployed, inventory=name, env={"DOCKER_HOST": "unix:///nowhere.sock"})
    result.error("build images: Docker of this machine does not answer", "start it, or name a host in stack.build")
    healed(deployed)


def test_a_build_that_fails_shows_its_last_words(deployed: Project) -> None:
    before = versions(deployed), running(deployed)
    name = variant(deployed, "broken", {"mta/Dockerfile": lambda text: text + "RUN echo what went wrong; exit 3\n"})
    result = deploy(deployed, inventory=name)
    result.error("this machine, build mta: ", "3", "what went wrong", "mta/Dockerfile")
    assert (versions(deployed), running(deployed)) == before
    healed(deployed)


# ---- what is on the hosts already ----


@contextmanager
def listening(project: Project, host: str, port: int) -> Iterator[None]:
    """Another program has the port."""
    program = f"import socket, time; s = socket.create_server(('', {port})); time.sleep(600)"
    project.sh(host, f'systemd-run -q --unit taken python3 -c "{program}"')
    try:
        eventually(lambda: f":{port} " in project.sh(host, "ss -Hltn"), 30)
        yield
    finally:
        project.sh(host, "systemctl stop taken")


def test_a_taken_port_is_seen_before_anything_is_made(empty: Project) -> None:
    with listening(empty, "host1", 25):
        deploy(empty).error("host1, place mta: port 25 is taken by another program", "ss -ltnp")
        empty.fab("plan", "--inventory", MAIL).error("port 25 is taken")
    assert versions(empty) == {} and not volume(empty, "host3", "mail_mail")
    healed(empty)


def test_a_volume_with_somebodys_data_is_refused(empty: Project) -> None:
    empty.sh("host3", "docker volume create mail_mail; echo kept >/var/lib/docker/volumes/mail_mail/_data/letters")
    deploy(empty).error(
        "host3, make volume mail_mail: ", "holds letters and has no marker", "docker volume rm mail_mail"
    )
    assert empty.sh("host3", "cat /var/lib/docker/volumes/mail_mail/_data/letters") == "kept\n"
    assert "mail_mda" not in services(empty)
    empty.sh("host3", "docker volume rm mail_mail")
    healed(empty)


# ---- images that do not start ----


def test_an_image_that_cannot_start_says_its_last_words_at_once(deployed: Project) -> None:
    name = variant(
        deployed, "dies", {"mta/mta": replaced("set -eu\n", "set -eu\necho 'this file is wrong' >&2; exit 1\n")}
    )
    result = deploy(deployed, inventory=name)
    result.error("host1, start mta: ", "non-zero exit", "it said: this file is wrong", "fab deploy")
    assert result.seconds < 90, "far below the deadline for a task"
    state = json.loads(deployed.fab("status", "--json", "--inventory", MAIL, check=0).stdout)
    assert "error" in state["queue"]
    healed(deployed)


def test_a_command_that_does_not_exist_is_said_at_once(deployed: Project) -> None:
    name = variant(deployed, "nocommand", {"mda/Dockerfile": lambda text: text + 'ENTRYPOINT ["/usr/bin/no-such"]\n'})
    result = deploy(deployed, inventory=name)
    result.error("host3, start mda: ", "it said: .*no-such", "fab deploy")
    healed(deployed)


def test_a_link_that_docker_lost_is_named_with_its_mend(empty: Project) -> None:
    """Docker was killed while it gave the overlay up on a host: seen there as vx-001001-zh8ni, down."""
    number = "com.docker.network.driver.overlay.vxlanid_list"
    vni = empty.sh("host1", f"docker network inspect -f '{{{{index .Options \"{number}\"}}}}' local-mail-delivery")
    empty.sh("host3", f"ip link add vx-lost type vxlan id {vni.strip()} dstport 4789")
    deploy(empty).error("host3, start mda: .*vxlan interface: file exists", "left on host3", "ip link del")
    empty.sh("host3", "ip link del vx-lost")
    healed(empty)


# ---- the fence ----


def restart(project: Project, host: str, service: str) -> None:
    project.sh(host, "docker container prune -f")
    if running_there := container(project, host, service):
        project.sh(host, f"docker kill {running_there}")


def words_of_the_fence(project: Project, host: str, service: str, pattern: str = "") -> str:
    """What the newest container that was refused said, when it said this."""
    label = f"label=com.docker.swarm.service.name={service}"
    found: list[str] = []

    def refused() -> bool:
        found[:] = project.sh(
            host,
            f"for c in $(docker ps -aq --no-trunc -f {label} -f exited=78); do docker logs $c 2>&1; done",
            check=False,
        ).splitlines()
        return bool(found and re.search(pattern, found[0]))

    with contextlib.suppress(AssertionError):
        eventually(refused, 30)
    assert found and re.search(pattern, found[0]), f"{service} on {host} said {found}, not: {pattern}"
    return found[0]


WRONG = (  # markers: what is other, what the fence says of it, and what deploy advises
    ({"cluster": "foreign"}, "belongs to cluster 'foreign', not to 'test'", "no volume with a marker"),
    ({"generation": "0"}, r"is an old copy \(generation 0, wanted 1\)", "."),
    ({"node": "another"}, r"was made for node 'another', this is '\w+'", "."),
    ({"state": "stale"}, "is marked 'stale', not 'live'", "no live copy"),
)


def test_a_wrong_marker_keeps_the_service_from_starting(deployed: Project) -> None:
    right = marker(deployed, "host3", "mail_mail")
    try:
        for change, words, advice in WRONG:
            mark(deployed, "host3", "mail_mail", **{**right, **change})
            restart(deployed, "host3", "mail_mda")
            whole = f"^swarmmail: mda does not start: the volume at /srv/mail {words}; "
            said = words_of_the_fence(deployed, "host3", "mail_mda", whole)
            assert not re.search(r"[^.]\.\.|\n", said) and said.endswith(".")
            deploy(deployed).error("mda: ", advice)
    finally:
        mark(deployed, "host3", "mail_mail", **right)
    healed(deployed)


def test_a_removed_marker_keeps_the_service_from_starting(deployed: Project) -> None:
    where = volume(deployed, "host1", "mail_queue") + "/.swarmmail-volume"
    deployed.sh("host1", f"mv {where} /run/marker")
    try:
        restart(deployed, "host1", "mail_mta")
        assert "has files but no marker" in words_of_the_fence(deployed, "host1", "mail_mta")
        deploy(deployed).error("place mta: ", "there is no volume with a marker", "bring the volume back")
    finally:
        deployed.sh("host1", f"cp /run/marker {where}")
    healed(deployed)


def test_a_label_moved_by_hand_brings_no_empty_mailbox_to_life(deployed: Project) -> None:
    address = account(deployed, "moved")
    token = send(deployed, address)
    arrives(deployed, address, "a secret of the tests", token)
    image = services(deployed)["mail_mda"]["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]
    deployed.copy_image(image, "host3", "host2")
    deployed.sh(
        "host1",
        "docker node update --label-rm swarmmail.mda host3; docker node update --label-add swarmmail.mda=true host2",
    )
    said = words_of_the_fence(deployed, "host2", "mail_mda")
    assert "the volume at /srv/mail is empty, its data is somewhere else or lost" in said
    deploy(deployed).error(
        "place mda: ", "the label is on host2", "live data is on host3", "--label-add swarmmail.mda=true"
    )
    deployed.sh(
        "host1",
        "docker node update --label-rm swarmmail.mda host2; docker node update --label-add swarmmail.mda=true host3",
    )
    healed(deployed)
    arrives(deployed, address, "a secret of the tests", token)
    deployed.sh("host2", "docker container prune -f; docker volume rm -f mail_mail")
    deployed.fab("user.remove", address, "--mail", "--inventory", MAIL, check=0)


def test_a_pruned_volume_is_never_replaced_by_an_empty_one(deployed: Project) -> None:
    address = account(deployed, "pruned")
    deployed.sh("host1", "docker node update --label-rm swarmmail.mda host3")
    eventually(lambda: not container(deployed, "host3", "mail_mda"), 20)
    deployed.sh("host3", "docker container prune -f; docker volume prune -af")
    assert not volume(deployed, "host3", "mail_mail")
    deployed.sh("host1", "docker node update --label-add swarmmail.mda=true host3")
    assert "is empty, its data is somewhere else or lost" in words_of_the_fence(deployed, "host3", "mail_mda")
    line = deploy(deployed).error("place mda: ", "there is no volume with a marker", "remove the label")
    # the operator does what the line says
    command = re.search(r"\((docker node update [^)]*)\)", line)
    assert command, line
    deployed.sh("host1", command[1])
    healed(deployed)
    assert marker(deployed, "host3", "mail_mail")["generation"] == "1"
    assert address not in accounts(deployed)


# ---- hosts that do not answer ----


def test_a_host_that_is_away(deployed: Project) -> None:
    """One without data is only noted; one with data stops deploy, before it does anything."""
    deployed.stop("host2")
    try:
        result = deploy(deployed, check=0)
        assert "deploy: nothing to do\n" in result.stdout
        assert any("host2 does not answer" in event for event in result.events), str(result)
        deployed.stop("host3")
        deploy(deployed).error("(host3, ssh: |no manager answers for the Swarm)")  # host1 alone is no majority
    finally:
        deployed.up()
    eventually(lambda: deployed.bootstrap(MAIL, "--plan").status == 0, 60, "the Swarm has its leader again")
    healed(deployed)


# ---- two operators, and runs that ended without a word ----


def test_two_operators_at_once(empty: Project) -> None:
    both = [empty.start("deploy", "--inventory", MAIL) for _ in range(2)]
    results = [empty.finish(process) for process in both]
    assert any(re.search(DONE, result.stdout, re.M) for result in results), str(results)
    for result in results:
        if result.status:
            # what the other one has made only half of it may see too
            result.error(
                r"(host1, lock: .*\(process \d+\) has been at work on 'deploy' for \d+ s.*|place (m[td]a|edge): )"
            )
        else:  # one was over, or as good as over, before the other began
            assert result.stdout == "deploy: nothing to do\n" or re.search(DONE, result.stdout, re.M), str(results)
    healed(empty)


def hold(project: Project, **changes: Any) -> None:
    """The lock, as another process or another machine would hold it."""
    owner = replace(lock.me("deploy"), **changes)
    project.host("host1").docker.create_config(lock.NAME, json.dumps(asdict(owner)).encode())


def drift(project: Project) -> None:
    """Something for deploy to do."""
    project.sh("host1", "docker service update -d --env-add DRIFT=1 mail_mta")


def test_the_lock_of_a_dead_run_is_taken_over_with_a_warning(deployed: Project) -> None:
    drift(deployed)
    hold(deployed, pid=2**22 + 1, since=time.time() - 600)
    result = deploy(deployed, check=0)
    warned = [line for line in result.errors if line.startswith("warning: ")]
    assert len(warned) == 1 and re.search(r"at work on 'deploy' for 10 min.* is taken over", warned[0]), str(result)
    assert "swarmmail-lock" not in versions(deployed)
    healed(deployed)


def test_the_lock_of_another_machine_is_explained_and_never_stolen(deployed: Project) -> None:
    drift(deployed)
    hold(deployed, user="anna", machine="elsewhere", pid=77, since=time.time() - 7200)
    try:
        for _ in range(2):
            deploy(deployed).error(
                r"lock: anna@elsewhere \(process 77\) has been at work on 'deploy' for 120 min", "lock.break"
            )
        assert "anna@elsewhere" in deployed.fab("lock.status", "--inventory", MAIL, check=0).stdout
        assert deployed.fab("plan", "--inventory", MAIL, check=2), "looking is free"
    finally:
        freed = deployed.fab("lock.break", "--inventory", MAIL, check=0)
    assert "anna@elsewhere" in freed.stdout
    assert "anna" not in deployed.fab("lock.status", "--inventory", MAIL, check=0).stdout
    healed(deployed)


@pytest.mark.timeout(1800)
def test_a_deploy_that_is_killed_anywhere_is_finished_by_the_next(empty: Project) -> None:
    """SIGKILL, spread at random over the whole length of a deploy that has everything to do but the images."""
    length = deploy(empty, check=0).seconds
    chance = random.Random(3)  # noqa: S311
    for number in range(KILLS):
        undeploy(empty)
        after = (number + chance.random()) / KILLS * length
        going = empty.start("deploy", "--inventory", MAIL)
        time.sleep(after)
        going.kill()
        _, said = going.communicate()
        result = deploy(empty)
        assert result.status == 0, f"killed after {after:.2f} s, having said {said}\n{result}"
        nothing = result.stdout == "deploy: nothing to do\n"
        assert nothing or re.search(DONE, result.stdout, re.M), str(result)
        if nothing:
            empty.fab("probe", "--inventory", MAIL, check=0)
        assert accounts_of(empty) == "", "also the probe of the killed run is tidied away"
    healed(empty)


def accounts_of(project: Project) -> str:
    mda = container(project, "host3", "mail_mda")
    return project.sh("host3", f"docker exec {mda} swarmmail-users list")


# ---- secrets ----


def test_no_secret_is_seen_anywhere(empty: Project, watch: Callable[[], str]) -> None:
    """In no output, no process list or environment of a host, no journal, no service, config or container."""
    password = "pass-word-that-nobody-sees"
    outputs = [deploy(empty, check=0, env={"SWARMMAIL_DEBUG": "1"}).output]
    for words, given in ((("user.add",), password), (("user.passwd",), password + "2"), (("user.list",), "")):
        address = ("secret@lab.test",) if given else ()
        outputs.append(empty.fab(*words, *address, "--inventory", MAIL, stdin=given + "\n", check=0).output)
    outputs.append(empty.fab("status", "--json", "--inventory", MAIL, check=0).output)
    outputs.append(empty.fab("user.remove", "secret@lab.test", "--mail", "--inventory", MAIL, check=0).output)
    key = "".join((empty.root / ".lab" / "tls.key").read_text().splitlines()[1:-1])
    tokens = empty.host("host1").docker.inspect_swarm()["JoinTokens"].values()
    seen = {
        "outputs": "".join(outputs),
        "processes": watch(),
        "journals": "".join(empty.sh(host, "journalctl --no-pager") for host in HOSTS),
        "services": empty.sh(
            "host1", "docker service inspect mail_mta mail_mda; docker config inspect $(docker config ls -q)"
        ),
        "containers": "".join(
            empty.sh(host, f"docker inspect {found}; docker logs {found} 2>&1")
            for host, found in running(empty).values()
        ),
    }
    assert "swarmmail-users" in seen["processes"] and "docker stack deploy" in seen["processes"], (
        "there is what to search"
    )
    for secret in (password, key, key[:40], *tokens):
        for where, text in seen.items():
            assert secret not in text, where


@pytest.fixture
def watch(lab: Project) -> Iterator[Callable[[], str]]:
    """Every command line and environment of every process on the hosts, while the test runs."""
    for host in HOSTS:
        lab.sh(
            host,
            "rm -f /run/watch.*; cat >/run/watch.sh <<'EOF'\n"
            "while [ ! -e /run/watch.end ]; do\n"
            "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '; sleep 0.02\n"
            "done\nEOF\n"
            "setsid sh /run/watch.sh >/run/watch.out 2>/dev/null </dev/null &",
        )
    yield lambda: "".join(lab.sh(host, "cat /run/watch.out") for host in HOSTS)
    for host in HOSTS:
        lab.sh(host, "touch /run/watch.end")
