"""``deploy`` and ``plan`` where all goes well: what they do, what they show, and what they leave alone."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess

import pytest
from conftest import DRIVER, HOSTS, MAIL, STACK, Project, eventually
from mailing import (
    DONE,
    accounts,
    container,
    deploy,
    forget,
    healed,
    marker,
    running,
    services,
    variant,
    versions,
    volume,
)

pytestmark = pytest.mark.lab

PLAN = ("plan", "--inventory", MAIL)


# ---- a first deploy and a second ----


def test_the_first_deploy_ends_with_a_mail_read_back_from_another_host(fresh: Project) -> None:
    """From bare hosts, in one command."""
    fresh.inventory(MAIL, stack=STACK)
    result = fresh.fab("bootstrap", "deploy", env={"SWARMMAIL_INVENTORY": MAIL}, check=0, timeout=300)
    assert re.search(DONE, result.stdout, re.M), str(result)
    assert result.errors == []
    assert {service: host for service, (host, _) in running(fresh).items()} == {
        "mail_mta": "host1",
        "mail_mda": "host3",
    }
    nodes = {node["Spec"]["Labels"]["swarmmail.host"]: node for node in fresh.host("host1").docker.nodes()}
    for host, name, service in (("host1", "mail_queue", "mta"), ("host3", "mail_mail", "mda")):
        assert marker(fresh, host, name) == {
            "cluster": "test",
            "service": service,
            "generation": "1",
            "node": nodes[host]["ID"],
            "state": "live",
        }
        assert [other for other in HOSTS if volume(fresh, other, name)] == [host]
        assert fresh.sh(host, f"stat -c '%U %a' {volume(fresh, host, name)}/.swarmmail-volume") == "root 644\n"
    for raw in services(fresh).values():
        image = raw["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]
        assert re.fullmatch(r"swarmmail/(mta|mda|edge):[0-9a-f]{12}", image), "a tag made of the content, never latest"
    assert accounts(fresh) == [], "the probe is tidy"


def test_a_second_deploy_says_nothing_to_do_and_changes_nothing(deployed: Project) -> None:
    before = versions(deployed), running(deployed)
    result = deploy(deployed, check=0)
    assert (result.stdout, result.stderr) == ("deploy: nothing to do\n", "")
    assert (versions(deployed), running(deployed)) == before


@pytest.mark.skipif(DRIVER == "vm" or os.geteuid() != 0, reason="there nothing is remembered")
def test_these_tests_know_whether_one_has_touched_something(deployed: Project) -> None:
    """If they never did, they would only be slow; if they always did, they would fail in another's place."""
    known = deployed.known
    assert known.still("hosts", "stack") and known.still("hosts", "stack")
    deployed.sh("host1", "docker service update -d --env-add DRIFT=1 mail_mta")
    assert known.still("hosts") and not known.still("stack")
    healed(deployed)
    assert known.still("hosts", "stack")
    deployed.sh("host3", "wg set swarmmail listen-port 51999")
    assert known.still("stack") and not known.still("hosts")
    deployed.sh("host3", "wg set swarmmail listen-port 51820")
    eventually(lambda: known.still("hosts", "stack"), 30, "it looks as before")


def test_deploy_without_the_probe(empty: Project) -> None:
    result = deploy(empty, "--no-probe", check=0)
    assert result.stdout.splitlines()[-1] == "deploy: all services run what was asked (the probe mail was left out)"
    assert not any("probe" in event for event in result.events)
    healed(empty)


# ---- plan ----


def test_plan_with_nothing_to_do_is_0(deployed: Project) -> None:
    result = deployed.fab(*PLAN, check=0)
    assert result.stdout == "plan: nothing to do\n" and result.errors == []


def test_plan_before_there_is_a_swarm_is_2(fresh: Project) -> None:
    fresh.inventory(MAIL, stack=STACK)
    result = fresh.fab(*PLAN, check=2)
    assert "make the Swarm" in result.stdout and "then: deploy stack mail (mta, mda, edge)" in result.stdout, str(
        result
    )
    assert fresh.host("host1").docker.info()["Swarm"]["LocalNodeState"] == "inactive"


def test_showing_what_would_be_deployed_changes_nothing(empty: Project) -> None:
    before = versions(empty)
    here = ("--inventory", MAIL)
    for words, status in ((PLAN, 2), (("deploy", "--plan", *here), 0), (("--dry", "deploy", *here), 0)):
        result = empty.fab(*words, check=status)
        for text in (
            "make volume mail_queue on host1, generation 1",
            "make volume mail_mail on host3, generation 1",
            "make secret mail_tls-key_",
            "make config mail_fence_",
            "create service mail_mta (swarmmail/mta:",
            "create service mail_mda (swarmmail/mda:",
        ):
            assert f"+ {text}" in result.stdout, str(result)
        assert versions(empty) == before == {}
        assert all(empty.sh(host, "docker volume ls -q; docker ps -aq") == "" for host in HOSTS)
        assert not any(
            key.startswith("swarmmail.m") for n in empty.host("host1").docker.nodes() for key in n["Spec"]["Labels"]
        )


# ---- what a change costs ----


def test_a_changed_file_updates_its_service_only_and_sends_the_missing_layers_only(deployed: Project) -> None:
    changed = variant(deployed, "changed", {"mta/main.cf": lambda text: text + "# changed\n"})
    before, was = services(deployed), running(deployed)
    plan = deployed.fab("plan", "--inventory", changed, check=2)
    assert re.search(r"update service mail_mta\n    image: swarmmail/mta:\w{12} -> swarmmail/mta:\w{12}\n", plan.stdout)
    assert "mda" not in plan.stdout
    result = deploy(deployed, inventory=changed, check=0)
    after, now = services(deployed), running(deployed)
    assert after["mail_mda"]["Version"] == before["mail_mda"]["Version"] and now["mail_mda"] == was["mail_mda"]
    images = [raw["mail_mta"]["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"] for raw in (before, after)]
    assert images[0] != images[1] and now["mail_mta"][1] != was["mail_mta"][1]
    # nothing for host3; for host1 a few layers of kilobytes, of an image of more than 100 MB
    sent = [event for event in result.events if "image (" in event]
    assert len(sent) == 1 and sent[0].startswith("host1: "), str(result)
    spared, megabytes = re.search(r"\((\d+) MB are there already\): (\d+\.\d) MB", sent[0]).groups()  # type: ignore[union-attr]
    assert int(spared) > 100 and float(megabytes) < 1
    assert "build swarmmail/mda" not in result.output
    healed(deployed)


def test_an_image_built_on_a_host(deployed: Project) -> None:
    """Without Docker on the operator's machine; where it is built it need not be brought to."""
    image = services(deployed)["mail_mda"]["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]
    edits = {
        "mda/mda": lambda text: text + "# changed\n",
        "mda/Dockerfile": lambda text: f"FROM {image}\nCOPY mda /usr/local/bin/\n",
    }
    changed = variant(deployed, "there", edits, build="host3")
    result = deploy(deployed, inventory=changed, check=0, env={"DOCKER_HOST": "unix:///nowhere.sock"})
    assert any(event.startswith("host3: built swarmmail/mda:") for event in result.events), str(result)
    assert not any("image" in event and "MB" in event for event in result.events), str(result)
    assert "# changed" in deployed.sh(
        "host3", f"docker exec {container(deployed, 'host3', 'mail_mda')} cat /usr/local/bin/mda"
    )
    healed(deployed)


def test_an_image_built_on_another_host_gets_its_base_and_is_brought_from_there(deployed: Project) -> None:
    """The base can be pulled from nowhere, but the operator's machine has it."""
    image = services(deployed)["mail_mta"]["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]
    deployed.sh("host2", f"docker rmi {image} >/dev/null 2>&1; true")
    edits = {
        "mta/mta": lambda text: text + "# changed\n",
        "mta/Dockerfile": lambda text: f"FROM {image}\nCOPY mta /usr/local/bin/\n",
    }
    changed = variant(deployed, "base", edits, build="host2")
    result = deploy(deployed, inventory=changed, check=0, timeout=240)
    sent = [event for event in result.events if "image" in event and " MB in " in event]
    assert [event.split(":")[0] for event in sent] == ["host2", "host1"], str(result)
    assert float(re.search(r"([\d.]+) MB in", sent[0])[1]) > 100 > 1 > float(re.search(r"([\d.]+) MB in", sent[1])[1])  # type: ignore[index]
    assert any(event.startswith("host2: built swarmmail/mta:") for event in result.events), str(result)
    healed(deployed)


def test_a_changed_setting_restarts_what_uses_it_only(deployed: Project) -> None:
    name = variant(deployed, "named", settings={"MAIL_DOMAIN": "lab.test", "MAIL_HOSTNAME": "other.lab.test"})
    before = running(deployed)
    result = deploy(deployed, inventory=name, check=0)
    assert (
        "    environment: - MAIL_HOSTNAME=mx.lab.test\n    environment: + MAIL_HOSTNAME=other.lab.test\n"
        in result.stdout
    )
    assert running(deployed)["mail_mda"] == before["mail_mda"]
    healed(deployed)


def test_what_no_view_shows_is_a_change_too(deployed: Project) -> None:
    """A health check is in no diff line of its own, but deployed all the same."""
    name = variant(deployed, "health", {"stack.yml": lambda text: text.replace("timeout: 10s", "timeout: 9s", 1)})
    result = deploy(deployed, inventory=name, check=0)
    assert "+ update service mail_mta\n    definition: other settings of the stack file" in result.stdout, str(result)
    check = services(deployed)["mail_mta"]["Spec"]["TaskTemplate"]["ContainerSpec"]["Healthcheck"]
    assert check["Timeout"] == 9_000_000_000
    healed(deployed)


def test_a_service_that_left_the_file_is_removed_and_its_volume_stays(deployed: Project) -> None:
    def more(text: str) -> str:
        service = (
            "  extra:\n    image: swarmmail/mta\n    build: ./mta\n    entrypoint: [sleep, '600']\n"
            "    volumes: ['extra:/data']\n    deploy: {endpoint_mode: dnsrr}\n    networks: [local-mail-delivery]\n"
        )
        return text.replace("\nnetworks:\n", f"\n{service}\nnetworks:\n").replace(
            "\n  mail:\n", "\n  mail:\n  extra:\n", 1
        )

    name = variant(deployed, "more", {"stack.yml": more}, placement={**STACK["placement"], "extra": "host2"})
    before = running(deployed)
    result = deploy(deployed, inventory=name, check=0)
    assert "+ create service mail_extra" in result.stdout
    assert container(deployed, "host2", "mail_extra")
    result = deploy(deployed, check=0)
    assert "+ remove service mail_extra (its volumes stay)" in result.stdout, str(result)
    assert set(services(deployed)) == {"mail_mta", "mail_mda", "mail_edge"}
    assert marker(deployed, "host2", "mail_extra")["service"] == "extra"
    assert running(deployed) == before
    eventually(lambda: not deployed.sh("host2", "docker ps -aq"), 20, "its container has ended")
    deployed.sh("host2", "docker volume rm mail_extra")
    forget(deployed, "extra")
    healed(deployed)


def test_a_service_with_data_is_never_moved(deployed: Project) -> None:
    """Invariant 4: the inventory says where a service begins, the Swarm where it is."""
    name = variant(deployed, "elsewhere", placement={"mta": "host2", "mda": "host2"})
    before = versions(deployed), running(deployed)
    result = deploy(deployed, inventory=name, check=0)
    for service, host in (("mta", "host1"), ("mda", "host3")):
        assert any(
            event.startswith(f"{service} stays on {host} (the inventory begins it on host2)") for event in result.events
        ), str(result)
    assert result.stdout == "deploy: nothing to do\n"
    assert (versions(deployed), running(deployed)) == before


# ---- drift: what was changed by hand ----


_UPDATE = "docker service update -d"
DRIFTS: dict[str, dict[str, tuple[str, ...]]] = {  # what was done by hand, and what the plan says of it
    "two services": {
        f"{_UPDATE} --env-add MAIL_DOMAIN=evil.test mail_mda": ("environment: - MAIL_DOMAIN=evil.test",),
        f"{_UPDATE} --args 'sleep 600' mail_mta": ("command: sleep 600 -> ",),
    },
    "label of no data": {
        "docker node update --label-rm swarmmail.edge host1": ("label the node of host1: edge is bound to it",)
    },
    "one service, and another removed": {
        f"{_UPDATE} --constraint-rm 'node.labels.swarmmail.mda == true' --cap-add SYS_ADMIN "
        "--publish-add published=10143,target=143,mode=host mail_mda": (
            "placement: + node.labels.swarmmail.mda == true",
            "ports: - 10143->143/tcp",
            "rights: - CAP_SYS_ADMIN",
        ),
        "docker service rm mail_mta": ("create service mail_mta",),
    },
}


@pytest.mark.parametrize("name", DRIFTS)
def test_drift_is_seen_and_mended(deployed: Project, name: str) -> None:
    """Each is in the plan, and nothing else is; one deploy mends them all."""
    deployed.sh("host1", " && ".join(DRIFTS[name]))
    plan = deployed.fab(*PLAN, check=2)
    for line in itertools.chain(*DRIFTS[name].values()):
        assert line in plan.stdout, str(plan)
    steps = [line for line in plan.stdout.splitlines() if line.startswith("+ ")]
    assert len(steps) == len(DRIFTS[name]), str(plan)
    result = deploy(deployed, check=0)
    assert re.search(DONE, result.stdout, re.M), str(result)
    assert deployed.fab(*PLAN, check=0).stdout == "plan: nothing to do\n"
    deployed.known.remember("stack")


def test_a_label_removed_by_hand_is_put_back_where_the_data_is(deployed: Project) -> None:
    deployed.sh("host1", "docker node update --label-rm swarmmail.mda host3")
    result = deploy(deployed, check=0)
    assert "label the node of host3: mda has its data there" in result.stdout, str(result)
    assert set(running(deployed)) == {"mail_mta", "mail_mda"}
    healed(deployed)


# ---- certificates ----


def test_a_renewed_certificate_is_served_and_the_old_one_is_pruned(deployed: Project) -> None:
    import trustme

    ca = trustme.CA()
    leaf = ca.issue_cert("mx.lab.test", *(deployed.address(host) for host in HOSTS))
    folder = deployed.root / "renewed"
    folder.mkdir(exist_ok=True)
    leaf.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    ca.cert_pem.write_to_path(folder / "ca.crt")
    tls = {
        name: f"../renewed/{file}" for name, file in (("certificate", "tls.crt"), ("key", "tls.key"), ("ca", "ca.crt"))
    }
    name = variant(deployed, "renewed", tls=tls)
    old = {n for n in versions(deployed) if "_tls-" in n}
    result = deploy(deployed, inventory=name, check=0)
    assert len(re.findall(r"^\+ make secret mail_tls-", result.stdout, re.M)) == 2
    assert len(re.findall(r"^    secrets: - mail_tls-", result.stdout, re.M)) == 4
    new = {n for n in versions(deployed) if "_tls-" in n}
    assert len(new) == 2 and not new & old, "the old ones are gone"
    for host, port, words in (
        ("host1", 25, ["-starttls", "smtp"]),
        ("host1", 993, []),
        ("host1", 143, ["-starttls", "imap"]),
    ):
        shown = subprocess.run(
            [
                "openssl",
                "s_client",
                "-connect",
                f"{deployed.address(host)}:{port}",
                "-CAfile",
                folder / "ca.crt",
                *words,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert "Verify return code: 0 (ok)" in shown.stdout, f"{host} {port}: {shown.stdout}{shown.stderr}"
    healed(deployed)
    assert {n for n in versions(deployed) if "_tls-" in n} == old


# ---- status ----


def test_status_as_json_and_as_a_screen(deployed: Project) -> None:
    state = json.loads(deployed.fab("status", "--json", "--inventory", MAIL, check=0).stdout)
    assert [(node["host"], node["state"], node["guarded"]) for node in state["nodes"]] == [
        (h, "ready", True) for h in HOSTS
    ]
    assert [(s["service"], s["host"], s["state"]) for s in state["services"]] == [
        ("edge", "host1", "healthy"),
        ("mda", "host3", "healthy"),
        ("mta", "host1", "healthy"),
    ]
    assert [(v["volume"], v["host"], v["generation"], v["state"]) for v in state["volumes"]] == [
        ("mail_queue", "host1", 1, "live"),
        ("mail_mail", "host3", 1, "live"),
    ]
    assert all(v["bytes"] > 0 for v in state["volumes"])
    assert state["queue"] == {"messages": 0} and state["pending"] == []
    assert state["encryption"]["configured"] == "wireguard" and state["encryption"]["measured"] is None
    screen = deployed.fab("status", "--inventory", MAIL, check=0).stdout
    assert (
        screen.count("healthy") == 3 and "queue: 0 messages" in screen and "configured encryption: wireguard" in screen
    )
    assert "encrypted" not in screen, "nothing was measured"
