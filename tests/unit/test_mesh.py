"""The WireGuard mesh: ``model.mesh`` (addresses, configuration) and what ``cluster.mesh`` puts on a host."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from importlib import resources
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest
from builders import address, make_facts, make_inventory
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmmail.cluster import mesh as work
from swarmmail.model import mesh as model
from swarmmail.model.errors import HostError, Refused
from swarmmail.model.facts import HostFacts, Mesh

FREE = IPv4Network("10.90.0.0/24")
KEYS = {f"host{i}": f"key{i}" for i in range(1, 6)}


def config(text: str) -> Mesh:
    return Mesh(config=f"[Interface]\nAddress = {text}\n")


def design(
    roles: str = "mmm", meshes: dict[str, Mesh] | None = None, members: dict[str, str] | None = None, **network: Any
) -> dict[str, str]:
    """Each host's tunnel address."""
    inventory = make_inventory(roles, **network)
    hosts = {name: make_facts(name, mesh=(meshes or {}).get(name, Mesh())) for name in inventory.hosts}
    found = model.design(inventory, hosts, FREE, 1500, members)
    assert set(found.addresses) == set(inventory.hosts)
    assert len(set(found.addresses.values())) == len(found.addresses)
    assert all(ip in found.subnet for ip in found.addresses.values())
    return {name: str(ip) for name, ip in found.addresses.items()}


# ---- who has which address ----


def test_new_hosts_get_the_lowest_addresses() -> None:
    assert design() == {"host1": "10.90.0.1", "host2": "10.90.0.2", "host3": "10.90.0.3"}


def test_addresses_are_kept_and_gaps_are_filled() -> None:
    meshes = {"host1": config("10.7.0.9/24"), "host3": config("10.7.0.1/24")}
    assert design("mmmm", meshes) == {
        "host1": "10.7.0.9",
        "host3": "10.7.0.1",
        "host2": "10.7.0.2",
        "host4": "10.7.0.3",
    }


def test_a_lost_configuration_costs_no_address() -> None:
    """Of host2 the running tunnel knows it, of host3 its Docker, of host4 the Swarm."""
    inventory = make_inventory("mmmm")
    hosts: dict[str, HostFacts] = {
        "host1": make_facts("host1", mesh=config("10.90.0.1/24")),
        "host2": make_facts("host2", mesh=Mesh(address="10.90.0.8")),
        "host3": make_facts("host3", node_address="10.90.0.7"),
        "host4": make_facts("host4"),
    }
    found = model.design(inventory, hosts, FREE, 1500, {"host4": "10.90.0.6"})
    assert [str(found.addresses[name]) for name in inventory.hosts] == [
        "10.90.0.1",
        "10.90.0.8",
        "10.90.0.7",
        "10.90.0.6",
    ]


def test_an_address_of_the_underlay_is_none_of_the_tunnel() -> None:
    inventory = make_inventory("m")
    found = model.design(inventory, {"host1": make_facts("host1", node_address=address(1))}, FREE, 1500)
    assert str(found.addresses["host1"]) == "10.90.0.1"


def test_an_address_is_not_given_away_while_a_former_host_is_still_a_node() -> None:
    assert design("mm", {"host1": config("10.90.0.1/24")}, {"host9": "10.90.0.2"})["host2"] == "10.90.0.3"


def test_a_configuration_wins_over_what_anybody_says() -> None:
    """A label set by hand says that host1 is where host2 is."""
    found = design("mm", {"host2": config("10.90.0.1/24")}, {"host1": "10.90.0.1"})
    assert found == {"host2": "10.90.0.1", "host1": "10.90.0.2"}


def test_a_copied_configuration_gets_a_new_address() -> None:
    meshes = dict.fromkeys(("host1", "host2"), config("10.90.0.1/24"))
    assert design("mm", meshes) == {"host1": "10.90.0.1", "host2": "10.90.0.2"}


def test_a_copied_key_is_refused() -> None:
    meshes = {"host1": Mesh(public_key="same"), "host3": Mesh(public_key="same")}
    with pytest.raises(Refused, match=r"host3, mesh: has the same tunnel key as host1.*rm /etc/wireguard/swarmmail"):
        design("mmm", meshes)


def test_two_subnets_are_refused() -> None:
    meshes = {"host1": config("10.90.0.1/24"), "host2": config("10.91.0.1/24")}
    with pytest.raises(Refused, match=r"host2, mesh: its tunnel is in 10\.91\.0\.0/24, the others' in 10\.90\.0\.0/24"):
        design("mm", meshes)
    with pytest.raises(Refused, match=r"host1, mesh: its tunnel is in 10\.90\.0\.0/24, the others' in 10\.50\.0\.0/24"):
        design("mm", {"host1": config("10.90.0.1/24")}, tunnel_subnet="10.50.0.0/24")


def test_a_subnet_that_is_wanted_is_taken() -> None:
    assert design("m", tunnel_subnet="10.50.0.0/28") == {"host1": "10.50.0.1"}


def test_a_full_subnet_is_refused() -> None:
    inventory = make_inventory("mmmm")
    hosts = {name: make_facts(name) for name in inventory.hosts}
    with pytest.raises(Refused, match=r"host3, mesh: subnet .* has no address left"):
        model.design(inventory, hosts, IPv4Network("10.90.0.0/30"), 1500)


@pytest.mark.parametrize("text", ["", "Address = ", "Address = nonsense", "# Address = 10.0.0.1/24"])
def test_a_configuration_without_an_address(text: str) -> None:
    assert model.interface_of(text) is None


# ---- the configuration ----


def sections(text: str) -> list[dict[str, str]]:
    """As wg-quick(8) reads it."""
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\[(Interface|Peer)\]", line):
            found.append({})
        elif line and not line.startswith("#"):
            key, _, value = line.partition(" = ")
            assert key not in found[-1]
            found[-1][key] = value
    return found


def test_a_configuration_whole() -> None:
    inventory = make_inventory("mw", hosts={"host2": {"nat": True}})
    hosts = {name: make_facts(name) for name in inventory.hosts}
    mesh = model.design(inventory, hosts, FREE, 1500)
    assert model.render(inventory, mesh, "host1", KEYS) == (
        "# Written by swarmmail bootstrap. The private key is in its own file.\n"
        "[Interface]\n"
        "Address = 10.90.0.1/24\n"
        "ListenPort = 51820\n"
        "MTU = 1420\n"
        "PostUp = wg set %i private-key /etc/wireguard/swarmmail.key\n"
        "\n"
        "# host2\n"
        "[Peer]\n"
        "PublicKey = key2\n"
        "AllowedIPs = 10.90.0.2/32\n"
        "PersistentKeepalive = 25"
    )
    inside = model.render(inventory, mesh, "host2", KEYS)
    assert "Endpoint = 198.18.0.11:51820\nPersistentKeepalive = 25" in inside
    assert "ListenPort" not in inside  # another one each time


def test_an_ipv6_endpoint_stands_in_brackets() -> None:
    inventory = make_inventory("mm", hosts={f"host{i}": {"advertise": f"2001:db8::{i}"} for i in (1, 2)})
    mesh = model.design(inventory, {name: make_facts(name) for name in inventory.hosts}, FREE, 1500)
    assert "Endpoint = [2001:db8::2]:51820" in model.render(inventory, mesh, "host1", KEYS)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.none() | st.integers(2, 5), st.integers(1, 65535), st.integers(1280, 9000))
def test_every_pair_can_meet(count: int, behind: int | None, port: int, mtu: int) -> None:
    """Each host has each other one as its peer, for that one's address only, and at least one end of each pair
    knows where the other is; an end that does not is kept open by the one behind NAT."""
    nat = {f"host{behind}": {"nat": True}} if behind is not None and behind <= count else {}
    inventory = make_inventory("m" + "w" * (count - 1), hosts=nat, tunnel_port=port)
    mesh = model.design(inventory, {name: make_facts(name) for name in inventory.hosts}, FREE, mtu)
    written = {name: sections(model.render(inventory, mesh, name, KEYS)) for name in inventory.hosts}
    for name, (own, *peers) in written.items():
        assert IPv4Interface(own["Address"]) == IPv4Interface(f"{mesh.addresses[name]}/24")
        assert (own.get("ListenPort"), own["MTU"]) == (None if name in nat else str(port), str(mtu - 80))
        by_key = {peer["PublicKey"]: peer for peer in peers}
        assert set(by_key) == {KEYS[other] for other in inventory.hosts if other != name}
        for other in inventory.hosts:
            if other == name:
                continue
            peer, back = by_key[KEYS[other]], {p["PublicKey"]: p for p in written[other][1:]}[KEYS[name]]
            assert peer["AllowedIPs"] == f"{mesh.addresses[other]}/32"
            assert "Endpoint" in peer or "Endpoint" in back
            assert ("Endpoint" in peer) == (other not in nat)
            assert ("PersistentKeepalive" in peer) == (name in nat or other in nat)


# ---- what is put on a host ----


MESH = model.Mesh(FREE, 1420, {"host1": IPv4Address("10.90.0.1")})


class Host:
    name = "host1"

    def __init__(self, answer: str = "") -> None:
        self.answer = answer
        self.asked: list[tuple[str, bytes]] = []

    def run(self, command: str, *, stdin: bytes = b"", **_: object) -> Any:
        self.asked.append((command, stdin))
        return type("Result", (), {"stdout": self.answer})


def test_the_files_are_whole_and_no_two_subnets_share_a_guard() -> None:
    files = work.files(MESH)
    assert not any(re.search(r"@[A-Z]+@", text) for text in files.values())
    guard = files[work.GUARD]
    assert "10.90.0.0/24" in guard
    assert 'iifname != "swarmmail" udp dport 4789' in guard
    other = model.Mesh(IPv4Network("10.91.0.0/24"), 1420, {})
    assert work.digests(MESH)[work.GUARD] != work.digests(other)[work.GUARD]
    assert set(work.digests(MESH)) == set(files)


def test_facts_look_at_the_files_that_are_written() -> None:
    script = (resources.files("swarmmail.hosts") / "facts.sh").read_text()
    line = next(line for line in script.splitlines() if line.startswith("s files"))
    assert all(path in line for path in work.files(MESH))


@pytest.mark.parametrize("text", [work.files(MESH)[work.GUARD], work._ACTIVATE, work._MAKE_KEY])
def test_the_scripts_are_posix_shell(text: str) -> None:
    shell = shutil.which("dash") or "sh"
    assert subprocess.run([shell, "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_docker_starts_after_guard_and_tunnel() -> None:
    files = work.files(MESH)
    unit = files["/etc/systemd/system/docker.service.d/swarmmail.conf"]
    assert "After=swarmmail-guard.service wg-quick@swarmmail.service" in unit
    assert f"ExecStartPre={work.GUARD} apply" in unit
    assert "Before=network-pre.target docker.service" in files["/etc/systemd/system/swarmmail-guard.service"]


def test_what_is_sent_to_a_host() -> None:
    host = Host()
    work.activate(host, MESH, "[Interface]\nAddress = 10.90.0.1/24")  # type: ignore[arg-type]
    ((command, archive),) = host.asked
    assert command.startswith("set -- 10.90.0.1 1420\n")
    work.activate(host, MESH, "", "a= b=")  # type: ignore[arg-type]
    assert host.asked[1][0].startswith("set -- 10.90.0.1 1420 a= b=\n")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        modes = {f"/{info.name}": info.mode for info in tar.getmembers()}
        written = tar.extractfile("etc/wireguard/swarmmail.new/swarmmail.conf")
        assert written is not None
        assert written.read() == b"[Interface]\nAddress = 10.90.0.1/24\n"
        assert {(info.uid, info.gid) for info in tar.getmembers()} == {(0, 0)}
    assert modes == {
        "/etc/wireguard/swarmmail.new/swarmmail.conf": 0o600,
        work.GUARD: 0o755,
        "/etc/systemd/system/swarmmail-guard.service": 0o644,
        "/etc/systemd/system/docker.service.d/swarmmail.conf": 0o644,
    }


def test_a_configuration_takes_its_place_only_when_it_is_in_force_or_the_tunnel_is_down() -> None:
    """So a run that was killed in between is seen by the next one, whatever it had changed."""
    running, _, down = work._ACTIVATE.partition("else\n")
    place = f"mv -T {work.NEW}/swarmmail.conf {work.CONFIG_FILE}"
    assert running.index("wg syncconf") < running.index("ip link set") < running.index(place)
    assert down.index("ip link del") < down.index(place) < down.index("systemctl start")
    assert work._ACTIVATE.count(work.CONFIG_FILE) == 2
    assert running.index("flock") < running.index("tar ")  # a killed run's script may still be at work


def test_a_key_is_made_on_the_host_and_only_its_public_half_comes_back() -> None:
    host = Host("x" * 43 + "=\n")
    assert work.make_key(host) == "x" * 43 + "="  # type: ignore[arg-type]
    ((command, sent),) = host.asked
    assert sent == b""
    assert re.findall(r"^wg pubkey", command, re.MULTILINE) == ["wg pubkey"]
    assert "umask 077" in command.splitlines()[1]


def test_no_key_is_an_error() -> None:
    with pytest.raises(HostError, match="host1, make the tunnel's key: wg printed no public key"):
        work.make_key(Host("\n"))  # type: ignore[arg-type]
