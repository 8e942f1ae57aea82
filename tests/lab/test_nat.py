"""The lab's topology ``nat``: host3 is on a network of its own, behind a router that translates addresses, drops what
nobody inside asked for, and forgets a silent UDP mapping after 30 s.

The MTA runs outside (host1), the MDA inside (host3). The hosts come from ``lab.up`` and its inventory as they are.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Project, eventually, temporary
from mailing import account, arrives, send
from test_lab import docker, traces

from swarmmail.lab.naming import Naming
from swarmmail.model.mesh import LOST

pytestmark = pytest.mark.lab

LAB = "lab"
"""The inventory that ``lab.up`` writes."""
TIMEOUT = 30
"""Seconds: a mapping's life in the router (``lab-router``)."""
PASSWORD = "of the tests behind NAT"


@pytest.fixture(scope="module")
def nat(place: Path) -> Iterator[Project]:
    with temporary(place, "nat") as project:
        project.fab("lab.up", "--topology", "nat", check=0)
        yield project


@pytest.fixture(scope="module")
def mail(nat: Project) -> Project:
    nat.fab("bootstrap", "deploy", env={"SWARMMAIL_INVENTORY": LAB}, timeout=300, check=0)
    return nat


@pytest.fixture(scope="module")
def alice(mail: Project) -> str:
    return account(mail, "alice", PASSWORD, LAB)


def mappings(project: Project, seen_as: str, to: str = "") -> list[dict[str, str]]:
    """UDP mappings of the router towards ``to``: the fields of the reply, which hold what the world sees."""
    found = []
    for line in project.sh("router", "cat /proc/net/nf_conntrack").splitlines():
        going, _, reply = line.rpartition(" src=")
        fields = dict(word.split("=", 1) for word in f"src={reply}".split() if "=" in word)
        if " udp " in going and fields["dst"] == seen_as and to in ("", fields["src"]):
            found.append(fields)
    return found


def router(project: Project) -> str:
    """The router's address outside."""
    return project.address("host1").rpartition(".")[0] + ".254"


def tunnel(project: Project, host: str) -> str:
    return project.sh(host, "sed -n 's,^Address = \\(.*\\)/.*,\\1,p' /etc/wireguard/swarmmail.conf").strip()


def endpoint(project: Project, host: str, peer: str) -> str:
    """Where the tunnel of a host looks for a peer now."""
    key = project.sh(peer, "wg show swarmmail public-key").strip()
    return dict(line.split("\t") for line in project.sh(host, "wg show swarmmail endpoints").splitlines())[key]


def pings(project: Project, host: str, address: str, count: int = 2) -> bool:
    return ", 0 received" not in project.sh(host, f"ping -c {count} -i 0.3 -W 2 {address}", check=False)


# ---- the topology itself ----


def test_nobody_outside_opens_a_connection_to_the_host_inside(nat: Project) -> None:
    """Not over this machine, which has an address on both networks, and not over the router, whoever knows it."""
    inside = nat.address("host3")
    assert inside.rpartition(".")[0] != nat.address("host1").rpartition(".")[0]
    for host in ("host1", "host2"):
        assert not pings(nat, host, inside, 1)
        nat.sh(host, f"ip route add {inside} via {router(nat)}")
        try:
            assert not pings(nat, host, inside, 1)
        finally:
            nat.sh(host, f"ip route del {inside}")
    assert nat.host("host3").run("hostname").stdout == "host3\n"  # the operator reaches it all the same


def test_the_only_way_out_is_the_router(nat: Project) -> None:
    outside = nat.address("host1")
    assert pings(nat, "host3", outside, 1)
    nat.sh("host3", f"ip route add {outside} via {nat.address('host3').rpartition('.')[0]}.1")  # this machine
    try:
        assert not pings(nat, "host3", outside, 1)
    finally:
        nat.sh("host3", f"ip route del {outside}")


_CATCH = """timeout 10 python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 9999)); s.settimeout(8)
print("bound", flush=True); data, peer = s.recvfrom(99); print(*peer)'"""
_THROW = """python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 9999)); s.sendto(b"hello", ("{to}", 9999))'"""


def test_outside_sees_the_router_with_another_port(nat: Project) -> None:
    with subprocess.Popen(
        ["docker", "exec", nat.container("host1"), "sh", "-c", _CATCH], stdout=subprocess.PIPE, text=True
    ) as catcher:
        assert catcher.stdout is not None
        assert catcher.stdout.readline() == "bound\n"
        nat.sh("host3", _THROW.format(to=nat.address("host1")))
        address, port = catcher.stdout.readline().split()
    assert address == router(nat)
    assert port != "9999"  # drawn from some 64,000


_SPEAK = """setsid timeout 20 python3 -c '
import contextlib, socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 9998))
while True:
    with contextlib.suppress(OSError): s.sendto(b"on", ("{to}", 9997))
    time.sleep(0.02)' >/dev/null 2>&1 &"""


def test_who_speaks_while_the_router_starts_is_translated_too(nat: Project) -> None:
    """Else its mapping would stay as it is for as long as it speaks, and no answer would come back."""

    def translated() -> bool:
        return bool(mappings(nat, router(nat), nat.address("host1")))

    nat.sh("host3", _SPEAK.format(to=nat.address("host1")))
    eventually(translated, 5, "a mapping with the router's address")
    docker("restart", "-t", "0", nat.container("router"))
    eventually(translated, 5, "a mapping with the router's address after its restart")


def test_up_again_changes_nothing_and_cannot_change_the_topology(nat: Project) -> None:
    assert "nothing changed" in nat.fab("lab.up", "--topology", "nat", check=0).stdout
    assert "nothing changed" in nat.fab("lab.up", check=0).stdout  # without the option: as it is
    result = nat.fab("lab.up", "--topology", "flat")
    result.error("lab.up --topology: the lab is nat, asked for is flat", "lab.down")
    assert [machine.nat for machine in nat.machines] == [False, False, True]


def test_status_shows_the_router_and_up_starts_it(nat: Project) -> None:
    docker("kill", nat.container("router"))
    report = json.loads(nat.fab("lab.status", "--json", check=0).stdout)
    assert (report["topology"], report["router"]) == ("nat", "exited")
    assert [(host["name"], host["nat"]) for host in report["hosts"]] == [
        ("host1", False),
        ("host2", False),
        ("host3", True),
    ]
    assert not pings(nat, "host3", nat.address("host1"), 1)
    assert "changed: router" in nat.fab("lab.up", check=0).stdout
    assert pings(nat, "host3", nat.address("host1"), 1)
    assert f"behind a router at {router(nat)} (running)" in nat.fab("lab.status", check=0).stdout


def test_a_host_inside_comes_back_behind_the_router_after_a_reboot(nat: Project) -> None:
    nat.reboot("host3")
    assert pings(nat, "host3", nat.address("host1"), 1)
    assert not pings(nat, "host1", nat.address("host3"), 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--topology", "star"), "topology: found 'star', allowed: flat, nat"),
        (("--topology", "nat", "--hosts", "2"), "hosts: 2, with topology nat 3 at least: host3 is the one"),
    ],
)
def test_impossible_topologies(make_project: Callable[[str], Project], words: tuple[str, ...], says: str) -> None:
    project = make_project("impossible")
    result = project.fab("lab.up", *words)
    assert result.status == 1 and len(result.errors) == 1 and result.errors[0].startswith(says), str(result)
    assert traces(project) == []


# ---- what swarmmail makes of it ----


def test_ipsec_is_refused_before_anything_is_done(nat: Project) -> None:
    """Here for what the inventory declares. That a host's address is not its own is seen by the plan: a unit test."""
    inventory = nat.inventory(
        "ipsec", {"host1": {}, "host2": {}, "host3": {"nat": True}}, network={"encryption": "ipsec"}
    )
    for task in ("bootstrap", "check"):
        result = nat.fab(task, "--inventory", inventory)
        assert result.status != 0
        assert [line for line in result.errors if "hosts.host3.nat" in line and "moby#37115" in line], str(result)
        assert "write encryption auto or wireguard" in result.stderr


def test_it_is_proven_through_the_router(mail: Project) -> None:
    """``bootstrap`` and ``deploy`` have ended with it, too: else they would have failed."""
    found = json.loads(mail.fab("verify", "--json", "--inventory", LAB, check=0).stdout)
    assert found["proven"]
    assert {f"{one['pair']} {one['verdict']}" for one in found["pairs"]} >= {
        "mta@host1 -> mda@host3 proven",
        "mda@host3 -> mta@host1 proven",
    }, found
    mail.fab("check", "--inventory", LAB, check=0)


def test_a_mail_crosses_and_nothing_is_left_to_do(mail: Project, alice: str) -> None:
    config = mail.sh("host1", "cat /etc/wireguard/swarmmail.conf")
    peer = config.split("# host3")[1].split("# ")[0]
    assert "Endpoint" not in peer and "PersistentKeepalive" in peer
    arrives(mail, alice, PASSWORD, send(mail, alice))
    assert endpoint(mail, "host1", "host3").rpartition(":")[0] == router(mail)
    assert mappings(mail, router(mail), mail.address("host1"))
    assert mail.bootstrap(LAB, check=0).stdout.endswith("nothing to do\n")


def test_a_mail_crosses_again_after_the_router_forgot_all(mail: Project, alice: str) -> None:
    """It restarts: no mapping is left, and the next ones have other ports. The tunnel's end outside follows."""
    before = endpoint(mail, "host1", "host3")
    docker("restart", "-t", "0", mail.container("router"))
    token = send(mail, alice)
    arrives(mail, alice, PASSWORD, token, seconds=180)  # what failed meanwhile is tried again within a minute
    after = endpoint(mail, "host1", "host3")
    assert after != before
    assert after.rpartition(":")[0] == router(mail)
    assert mail.bootstrap(LAB, check=0).stdout.endswith("nothing to do\n")


def test_a_mapping_that_leads_nowhere_is_left_by_bootstrap(mail: Project, alice: str) -> None:
    """The keepalive holds it: for ever, unless host3 calls from another port."""
    port = mail.sh("host3", "wg show swarmmail listen-port").strip()
    mail.sh("router", f"nft insert rule ip router forward ip daddr {mail.address('host1')} udp sport {port} drop")
    token = send(mail, alice)
    found = json.loads(mail.fab("check", "--json", "--inventory", LAB).stdout)
    nowhere = [one for one in found["findings"] if "no answer comes back to host3 through its router" in one["why"]]
    assert nowhere and all(one["mend"].startswith("fab bootstrap") for one in nowhere), found
    last = f"wg show swarmmail latest-handshakes | grep -F '{mail.sh('host1', 'wg show swarmmail public-key').strip()}'"
    eventually(lambda: time.time() - int(mail.sh("host3", last).split()[1]) > LOST, LOST + 10, "a session's end")
    result = mail.bootstrap(LAB, timeout=300, check=0)  # which has to wait until Docker calls again, too
    assert "no handshake with host1 for" in result.stdout, str(result)
    assert mail.sh("host3", "wg show swarmmail listen-port").strip() != port
    arrives(mail, alice, PASSWORD, token, seconds=120)
    assert mail.bootstrap(LAB, check=0).stdout.endswith("nothing to do\n")


_NO_KEEPALIVE = "for peer in $(wg show swarmmail peers); do wg set swarmmail peer $peer persistent-keepalive 0; done"


def test_after_silence_the_host_inside_is_still_reachable(mail: Project) -> None:
    """Docker is stopped everywhere, so that nothing but the keepalive uses the tunnel: the mapping must outlive
    its timeout. Last of all tests here. Its control: without keepalive the mapping goes, and with it the way in."""
    everybody = ("host1", "host2", "host3")
    inside = tunnel(mail, "host3")
    for host in everybody:
        mail.sh(host, "systemctl stop docker.service docker.socket")
    try:
        eventually(lambda: pings(mail, "host1", inside), 60, "the tunnel is up")
        time.sleep(TIMEOUT + 15)
        assert pings(mail, "host1", inside)
        for host in everybody:
            mail.sh(host, _NO_KEEPALIVE)
        # WireGuard answers the last data with one keepalive of its own, 10 s later
        eventually(lambda: not mappings(mail, router(mail)), TIMEOUT + 60, "every mapping is forgotten")
        assert not pings(mail, "host1", inside)
        assert pings(mail, "host3", tunnel(mail, "host1"), 5)  # from inside the way opens again
    finally:
        for host in everybody:
            mail.sh(host, "systemctl restart wg-quick@swarmmail; systemctl start docker.socket docker.service")


# ---- the end ----


def test_down_leaves_nothing_behind_also_of_a_half_made_lab(make_project: Callable[[str], Project]) -> None:
    """Killed when the router is there and hosts are being made."""
    project = make_project("half")
    names = Naming.of(project.root)
    devices = [Path("/sys/class/net") / name for name in (names.bridge, names.inner_bridge)]
    going = project.start("lab.up", "--topology", "nat")
    eventually(lambda: docker("ps", "-aq", "--filter", f"name={project.container('router')}"), 60, "a router")
    going.kill()
    going.communicate()
    project.fab("lab.down", check=0)
    assert traces(project) == []
    assert not any(device.exists() for device in devices)


def test_a_killed_up_is_completed_with_its_topology(make_project: Callable[[str], Project]) -> None:
    """Killed when the first network stands: the labels tell the next ``up`` what the lab was to become."""
    project = make_project("cut")
    names = Naming.of(project.root)
    going = project.start("lab.up", "--topology", "nat")
    eventually((Path("/sys/class/net") / names.bridge).exists, 60, "the first bridge is there")
    going.kill()
    going.communicate()
    project.fab("lab.up", "--topology", "flat").error("the lab is nat")
    project.fab("lab.up", check=0)
    assert [machine.nat for machine in project.machines] == [False, False, True]
    project.fab("lab.down", check=0)
    assert traces(project) == []
    assert not (Path("/sys/class/net") / names.inner_bridge).exists()
