"""Moves of a service without data: it answers there before it ends here, and the public address follows."""

from __future__ import annotations

import imaplib
import re

import pytest
from conftest import DRIVER, HOSTS, MAIL, PATIENCE, Project, eventually
from mailing import PASSWORD, arrives, container, deploy, healed, replaced, send, trusting, variant, versions
from moving import USERS, call, clean, finish, has_begun, labelled, migrate, other, place, told, with_hook
from stream import Probe

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("back_to_the_beginning")]


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
        ("prepare", "abort"),
        ("standby", "resume"),
        ("address", "abort"),
        ("tidy", "the same"),
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
        patience = PATIENCE if DRIVER == "vm" else 1  # the whole time is waited for
        result = migrate(mailing, "host2", service="edge", env={"SWARMMAIL_PATIENCE": str(patience)})
        waited = f"edge was not up there within {60 * patience} s"
        result.error(f"host2, standby: {waited}; it stays on host1", "docker service ps")
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
