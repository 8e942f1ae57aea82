"""``model.facts``: reading what ``hosts/facts.sh`` prints. ``data/facts-trixie.txt`` is what a lab host printed (Debian
trixie, Docker 26.1, first manager of three, with the MTA's volume), brought into today's order of sections; kernel
version, engine id and MainPIDs are made up."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmmail.hosts import facts as gathering
from swarmmail.model import facts
from swarmmail.model.errors import HostError
from swarmmail.model.facts import HostFacts, Marker, parse, parse_marker

TEXT = (Path(__file__).parent / "data" / "facts-trixie.txt").read_text()
SCRIPT = Path(gathering.__file__).with_name("facts.sh")
PEERS = frozenset({"wRXeMCfGA6g9TwByJ9+szF4E37B1mZk2ryw8x+BRQjc=", "zodNyNvWdqb4Np36Djk2+cKqgf5R2+OMzrmehaEp8Ww="})


def changed(section: str, body: str, text: str = TEXT) -> HostFacts:
    """The recorded facts, with one section's text replaced."""
    new, count = re.subn(rf"(?ms)^@@{section}\n.*?(?=^@@)", lambda _: f"@@{section}\n{body}\n\n", text)
    assert count == 1
    return parse("host1", new)


def test_a_real_host() -> None:
    seen = parse("host1", TEXT)
    assert (seen.name, seen.os, seen.os_like, seen.os_name) == ("host1", "debian", (), "Debian GNU/Linux 13 (trixie)")
    assert (seen.kernel, seen.machine, seen.hostname, seen.systemd) == ("6.12.48+deb13-amd64", "x86_64", "host1", True)
    assert seen.clock == pytest.approx(1795581811.142)
    assert {"docker", "dockerd", "wg-quick", "wireguard-go", "nft"} <= seen.programs
    assert (seen.engine, seen.live_restore) == ("26.1.5+dfsg1", False)
    assert (seen.swarm, seen.swarm_error, seen.is_manager) == ("active", "", True)
    assert (seen.node, seen.node_address) == ("pn6dosmzootdtbeop7kfi4hyn", "10.90.0.1")
    assert seen.cluster == "jbvhdmmhbhf7ehajhr0q4m2c4"
    assert sorted(seen.managers) == ["10.90.0.1", "10.90.0.2", "10.90.0.3"]
    assert seen.peers == frozenset({"10.90.0.1", "10.90.0.2", "10.90.0.3"})
    assert seen.addresses["eth0"] == ("198.18.9.11",)
    assert (seen.mtus["eth0"], seen.mtus["swarmmail"]) == (1400, 1320)
    assert (seen.link_of("198.18.9.11"), seen.link_of("10.90.0.1"), seen.link_of("192.0.2.1")) == (
        "eth0",
        "swarmmail",
        None,
    )
    assert set(seen.routes) == {
        IPv4Network(text) for text in ("10.90.0.0/24", "172.17.0.0/16", "172.18.0.0/16", "198.18.9.0/24")
    }
    assert seen.resolvers == ("10.255.255.53",)
    assert (seen.tun, seen.wireguard_kernel, seen.esp) == (True, False, False)
    assert seen.docker_esp is False
    assert (changed("docker-esp", "yes").docker_esp, changed("docker-esp", "").docker_esp) == (True, None)
    assert seen.units == dict.fromkeys(("docker", "swarmmail-guard", "wg-quick@swarmmail"), ("active", "enabled"))
    assert seen.listening == {22, 25, 2377, 7946}
    assert seen.markers == (Marker("mail_queue", "lab", "mta", 1, "pn6dosmzootdtbeop7kfi4hyn", "live"),)


def test_a_real_tunnel() -> None:
    mesh = parse("host1", TEXT).mesh
    assert mesh.config.startswith("# Written by swarmmail bootstrap.")
    assert mesh.config.endswith("Endpoint = 198.18.9.13:51820")
    assert (mesh.public_key, mesh.peers) == ("QHG5mm9psuW1QYCnxOqcfr3qx50WIB6jx9v6Gl64K2w=", PEERS)
    assert (mesh.address, mesh.port, mesh.guarded) == ("10.90.0.1", 51820, True)
    assert mesh.age == pytest.approx(62.5)
    (heard,) = mesh.heard.items()  # of the other one never
    assert heard == ("wRXeMCfGA6g9TwByJ9+szF4E37B1mZk2ryw8x+BRQjc=", pytest.approx(31.14, abs=0.01))
    assert {path: digest[:8] for path, digest in mesh.files.items()} == {
        "/etc/swarmmail/guard": "4ed9a693",
        "/etc/systemd/system/swarmmail-guard.service": "d70c1917",
        "/etc/systemd/system/docker.service.d/swarmmail.conf": "70b1f4d2",
    }


def test_script_and_record_have_the_same_sections() -> None:
    sections = re.findall(r"^s ([a-z-]+)", SCRIPT.read_text(), re.MULTILINE)
    assert sections == re.findall(r"^@@(.*)$", TEXT, re.MULTILINE)


def test_a_bare_host_is_all_empty() -> None:
    assert parse("bare1", "\n@@end\n") == HostFacts("bare1")
    sections = re.findall(r"^@@.*$", TEXT, re.MULTILINE)
    assert parse("bare1", "\n\n".join(sections)) == HostFacts("bare1")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_section_that_cannot_be_read_never_ends_the_task(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(re.findall(r"^@@(.*)$", TEXT, re.MULTILINE)[:-1]))
    body = data.draw(
        st.sampled_from(["null", "[]", "{}", "[null]", "[{}]", "3", '"text"', "one", "one two", "LISTEN 0 1 x", "a=b"])
        | st.text(st.characters(codec="utf-8", exclude_characters="@\r"), max_size=30)
    )
    seen = changed(section, body)
    for name in (field.name for field in dataclasses.fields(HostFacts)):
        if name not in AFFECTED.get(section, {section}):
            assert getattr(seen, name) == getattr(parse("host1", TEXT), name)


AFFECTED = {
    "uptime": {"mesh"},
    "clock": {"clock", "mesh"},
    "os": {"os", "os_like", "os_name"},
    "docker": {
        *("engine", "swarm", "swarm_error", "node", "node_address", "is_manager", "cluster", "managers", "peers"),
        "live_restore",
    },
    "addresses": {"addresses", "mtus", "mesh"},
    "wireguard": {"wireguard_kernel"},
    "docker-esp": {"docker_esp"},
    "units": {"units", "mesh"},
    "volumes": {"markers"},
    **{key: {"mesh"} for key in ("mesh-config", "mesh-key", "mesh-peers", "mesh-port", "files", "guard")},
}


# ---- Docker's answer ----


def docker(**swarm: object) -> HostFacts:
    return changed("docker", json.dumps({"ServerVersion": "26.1.5", "Swarm": swarm}))


def test_a_docker_that_does_not_run() -> None:
    """The client prints what it knows itself, and why there is no more."""
    seen = changed("docker", json.dumps({"ServerErrors": ["Cannot connect"], "ServerVersion": "", "Swarm": None}))
    assert (seen.engine, seen.swarm, seen.node, seen.peers) == ("", "inactive", "", None)


def test_the_states_of_a_swarm_as_docker_says_them() -> None:
    """Seen with Docker 26.1; see ``bootstrap._membership``."""
    half = docker(
        NodeID="",
        NodeAddr="198.18.0.12",
        LocalNodeState="pending",
        ControlAvailable=False,
        Error="",
        RemoteManagers=[{"NodeID": "", "Addr": "198.18.0.11:2377"}],
    )
    assert (half.swarm, half.node, half.managers, half.peers) == ("pending", "", ("198.18.0.11",), None)
    deaf = docker(
        NodeID="", NodeAddr="10.90.0.1", LocalNodeState="error", Error="manager stopped: ...", RemoteManagers=None
    )
    assert (deaf.swarm, deaf.swarm_error, deaf.node_address, deaf.managers) == (
        "error",
        "manager stopped: ...",
        "10.90.0.1",
        (),
    )
    alone = docker(NodeID="n1", LocalNodeState="pending", ControlAvailable=True, Cluster={"ID": ""})
    assert (alone.swarm, alone.is_manager, alone.cluster) == ("pending", True, "")


def test_managers_with_ipv6_addresses() -> None:
    seen = docker(LocalNodeState="active", RemoteManagers=[{"Addr": "[fd00::11]:2377"}])
    assert seen.managers == ("fd00::11",)


def test_an_ingress_network_that_is_not_there_says_nothing_of_the_gossip() -> None:
    assert changed("peers", "").peers is None
    assert changed("peers", "null").peers == frozenset()


def test_what_the_api_says_is_read_like_what_the_script_prints() -> None:
    info = json.loads(re.search(r"(?ms)^@@docker\n(.*?)^@@", TEXT)[1])  # type: ignore[index]
    seen = parse("host1", TEXT)
    found = facts.of_docker(info, seen.peers)
    assert {name: getattr(seen, name) for name in found} == found
    assert set(found) == AFFECTED["docker"]
    assert facts.peers_of({"Peers": [{"Name": "x", "IP": "10.0.0.1"}]}) == {"10.0.0.1"}
    assert facts.peers_of({"Peers": None}) == facts.peers_of({}) == frozenset()


# ---- the rest ----


def test_units() -> None:
    one = "Id=docker.service\nActiveState=active\nUnitFileState=enabled"
    other = "ActiveState=inactive\nUnitFileState=\nId=wg-quick@swarmmail.service"
    assert changed("units", f"{one}\n\n{other}").units == {
        "docker": ("active", "enabled"),
        "wg-quick@swarmmail": ("inactive", ""),
    }


@pytest.mark.parametrize(
    ("line", "ports"),
    [
        ("LISTEN 0 128 0.0.0.0:22 0.0.0.0:*", {22}),
        ("LISTEN 0 128 [::]:143 [::]:*", {143}),
        ("LISTEN 0 128 *:993 *:*", {993}),
        ("LISTEN 0 128 10.90.0.1%swarmmail:7946 0.0.0.0:*", {7946}),
        ("LISTEN 0 128 127.0.0.1:25 0.0.0.0:*", set()),
        ("LISTEN 0 128 127.0.0.53%lo:53 0.0.0.0:*", set()),
        ("LISTEN 0 128 [::1]:25 [::]:*", set()),
    ],
)
def test_ports(line: str, ports: set[int]) -> None:
    assert changed("listening", line).listening == ports


def test_routes_that_are_in_use() -> None:
    routes = [
        {"dst": "default"},
        {"dst": "192.0.2.7", "dev": "eth0"},
        {"type": "blackhole", "dst": "10.90.0.0/24"},
        {"type": "unreachable", "dst": "10.1.0.0/16"},
        {"type": "local", "dst": "10.2.0.1", "table": "local"},
    ]
    assert changed("routes", json.dumps(routes)).routes == (IPv4Network("192.0.2.7/32"), IPv4Network("10.90.0.0/24"))


def test_os_release_may_be_quoted() -> None:
    seen = changed("os", 'ID=\'linuxmint\'\nID_LIKE="ubuntu debian"\nPRETTY_NAME=Mint\nBROKEN="')
    assert (seen.os, seen.os_like, seen.os_name) == ("linuxmint", ("ubuntu", "debian"), "Mint")


def test_markers_of_several_volumes() -> None:
    one = "volume=mail_queue\ncluster=lab\nservice=mta\ngeneration=3\nnode=n1\nstate=live\n"
    two = "volume=mail_store\ncluster=lab\nservice=mda\ngeneration=x\nnode=n1\nstate=stale\n"
    queue, store = (
        Marker("mail_queue", "lab", "mta", 3, "n1", "live"),
        Marker("mail_store", "lab", "mda", 0, "n1", "stale"),
    )
    assert changed("volumes", f"{one}\n{two}").markers == (queue, store)
    assert changed("volumes", f"{one}{two}").markers == (queue, store), "a marker without a newline at its end"


def test_a_marker_that_cannot_be_read_is_accepted_by_nobody() -> None:
    assert parse_marker("v", "") == Marker("v", "", "", 0, "", "")
    assert parse_marker("v", "generation=-1").generation == 0
    assert parse_marker("v", "generation=\u00b2").generation == 0
    assert parse_marker("v", "service=a=b").service == "a=b"


# ---- gathering ----


class Host:
    name = "host1"

    def __init__(self, stdout: str, stderr: str = "") -> None:
        self.answer = stdout, stderr
        self.asked: list[tuple[str, str]] = []

    def run(self, command: str, *, stdin: str, **_: object) -> object:
        self.asked.append((command, stdin))
        stdout, stderr = self.answer
        return type("Result", (), {"stdout": stdout, "stderr": stderr})


def test_facts_come_in_one_round_trip() -> None:
    host = Host(TEXT)
    assert gathering.gather(host) == parse("host1", TEXT)  # type: ignore[arg-type]
    assert host.asked == [("sh -s", SCRIPT.read_text().replace("@ANSWER@", "25"))]


@pytest.mark.parametrize(
    ("says", "key"), [("(none)", "of the file"), ("of the link", "of the link"), ("", "of the file")]
)
def test_a_tunnel_that_is_just_starting_has_the_key_of_its_file(tmp_path: Path, says: str, key: str) -> None:
    (tmp_path / "key").write_text("private")
    line = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("s mesh-key"))
    other = f"echo '{says}'" if says else "false"
    fake = f"s() {{ :; }}\nwg() {{ if [ $1 = pubkey ]; then echo of the file; else {other}; fi; }}\n"
    script = fake + line.replace("/etc/wireguard/swarmmail.key", str(tmp_path / "key"))
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == f"{key}\n"


UNITS = "MainPID=77\nId=docker.service\n\nMainPID=0\nId=other.service"
SOCKET = "lrwx------ 1 root root 64 Nov 26 12:00 7 -> socket:[{}]"


@pytest.mark.parametrize(
    ("units", "links", "says"),
    [
        (UNITS, SOCKET.format(4242), "yes"),
        (UNITS, SOCKET.format(424), "no"),  # of another family
        (UNITS, SOCKET.format(242), "no"),  # a part of the number
        (UNITS, "", "no"),
        (UNITS.replace("77", "0"), SOCKET.format(4242), ""),  # Docker does not run
        ("", SOCKET.format(4242), ""),  # no systemd
    ],
)
def test_docker_has_a_socket_for_esp_when_one_of_its_own_is_of_that_family(
    tmp_path: Path, units: str, links: str, says: str
) -> None:
    netlink = tmp_path / "netlink"
    netlink.write_text(
        "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n"
        "0000000000000000 0   77         00000000 0        0        0     2        0        424\n"
        "0000000000000000 6   77         00000000 0        0        0     2        0        4242\n"
    )
    script = SCRIPT.read_text()
    part = script[script.index("s units\n") : script.index("s addresses")].replace("/proc/net/netlink", str(netlink))
    fake = (
        "s() { echo @@$1; }\n"
        f"systemctl() {{ echo '{units}'; }}\n"
        f"ls() {{ [ $2 = /proc/77/fd ] && echo 'total 0' && echo '{links}' && echo 'l 1 r r 64 8 -> /dev/null'; }}\n"
    )
    said = subprocess.run(["sh", "-c", fake + part], capture_output=True, text=True).stdout
    assert said == f"@@units\n{units}\n@@docker-esp\n{says}{chr(10) if says else ''}"


@pytest.mark.parametrize(
    ("link", "vni"),
    [
        ("5: vxlan0: <UP> mtu 1370 link/ether 02:42 promiscuity 1 vxlan id 4097 srcport 0 0 dstport 4789", "4097"),
        ("5: vxlan0: <UP> vxlan id 4098 dstport 4789\n6: other: <UP> vxlan id 7 dstport 4789", "4098"),
        ("5: vxlan0: <UP> mtu 1370 vxlan external dstport 4789", ""),
        (
            "5: vxlan0: <UP> vxlan id 4097 dstport 4789\n02:42:0a:5a:01:04 dev vxlan0 dst 192.0.2.1 self permanent\n"
            "02:42:0a:5a:01:05 dev vxlan0 dst 192.0.2.2 self\n02:42:0a:5a:01:06 dev vxlan0 dst 192.0.2.1 self\n"
            "02:42:0a:5a:01:07 dev br0 self permanent",
            "4097 192.0.2.1 192.0.2.2",
        ),
        ("", ""),
    ],
)
def test_an_overlay_is_told_by_its_link_and_to_whom_it_sends(tmp_path: Path, link: str, vni: str) -> None:
    (tmp_path / "1-qh09mfvjpt").touch()
    script = SCRIPT.read_text()
    part = script[script.index("s overlays\n") : script.index("s esp-rules")]
    part = part.replace("/var/run/docker/netns", str(tmp_path))
    fake = f"s() {{ :; }}\nnsenter() {{ echo '{link}'; }}\n"
    said = subprocess.run(["sh", "-c", fake + part], capture_output=True, text=True).stdout
    assert said == f"qh09mfvjpt {vni}\n"


POLICY = "src 192.0.2.1/32 dst 192.0.2.2/32 proto udp dport 4789"
THERE = "src 192.0.2.1 dst 192.0.2.2"
BACK = "src 192.0.2.2 dst 192.0.2.1"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (None, None),
        ([], set()),
        ([POLICY, THERE, BACK], {"192.0.2.2"}),
        ([POLICY], set()),
        ([THERE, BACK], set()),
        ([POLICY, THERE], set()),
        (["src 192.0.2.1/32 dst 192.0.2.2/32 proto tcp dport 25", THERE, BACK], set()),
    ],
)
def test_esp_with_a_host_needs_a_policy_and_states_both_ways(lines: list[str] | None, found: set[str] | None) -> None:
    said = "@@esp-peers\n" + "\n".join(["read", *lines] if lines is not None else []) + "\n@@end\n"
    assert facts.parse("host1", said).esp_peers == found


@pytest.mark.parametrize("end", [0, 100, len(TEXT) // 2, TEXT.index("@@end")])
def test_facts_that_were_cut_off_are_no_facts(end: int) -> None:
    with pytest.raises(HostError, match=r"host1, gather facts: the facts are incomplete \(sh: no space\)"):
        gathering.gather(Host(TEXT[:end], "sh: no space\n"))  # type: ignore[arg-type]


def test_the_link_of_an_address_is_only_its_own() -> None:
    assert facts.HostFacts("x", addresses={"a": ("10.0.0.1",), "b": ("10.0.0.11",)}).link_of("10.0.0.11") == "b"
