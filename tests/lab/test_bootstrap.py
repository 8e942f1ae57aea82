"""``bootstrap`` where all goes well, what it leaves behind, and how that mends itself."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CLUSTER, HOSTS, Project, Result, eventually, temporary

pytestmark = pytest.mark.lab

VXLAN = 4789
STRANGER = "02:00:00:00:be:ef"
"""A source MAC that no host has an entry for: with a known one the kernel itself drops a packet that comes from
another address, and the test would pass for the wrong reason."""


def swarm(project: Project, manager: str = "host1") -> dict[str, tuple[str, str, dict[str, str]]]:
    """Each host's role, state and labels, as a manager sees them; the labels name the hosts."""
    return {
        node["Spec"]["Labels"].get("swarmmail.host", node["ID"]): (
            node["Spec"]["Role"],
            node["Status"]["State"],
            node["Spec"]["Labels"],
        )
        for node in project.host(manager).docker.nodes()
    }


def versions(project: Project) -> dict[str, int]:
    """The version of every object of the Swarm that bootstrap could change. The cluster's own goes up by itself
    (raft, certificates), so its specification stands for it."""
    api = project.host("host1").docker
    found = {f"node {node['ID']}": hash(json.dumps(node["Spec"], sort_keys=True)) for node in api.nodes()}
    found |= {f"network {network['Id']}": 0 for network in api.networks(filters={"driver": "overlay"})}
    found |= {f"config {config['ID']}": config["Version"]["Index"] for config in api.configs()}
    found["swarm"] = hash(json.dumps(api.inspect_swarm()["Spec"], sort_keys=True))
    return found


# ---- a first run and a second ----


def test_three_fresh_hosts_become_a_swarm_over_a_guarded_mesh(fresh: Project) -> None:
    result = fresh.bootstrap(CLUSTER, check=0)
    assert result.stdout.splitlines()[-1] == "bootstrap: test is as the inventory wants it"
    assert any("encryption: wireguard (no ESP with AES-GCM" in event for event in result.events), str(result)
    assert result.errors == []
    nodes = swarm(fresh)
    assert {host: node[:2] for host, node in nodes.items()} == dict.fromkeys(HOSTS, ("manager", "ready"))
    network = fresh.host("host1").docker.inspect_network("local-mail-delivery")
    assert network["Attachable"] and network["Labels"] == {"swarmmail.cluster": "test"}
    for name in HOSTS:
        host = fresh.host(name)
        link = json.loads(host.run("ip -j addr show dev swarmmail").stdout)[0]
        address = link["addr_info"][0]["local"]
        assert host.docker.info()["Swarm"]["NodeAddr"] == address
        # the Swarm's own ports listen on the tunnel only
        listening = host.run("ss -Hltn | awk '{print $4}'").stdout.split()
        assert sorted(entry for entry in listening if entry.endswith((":2377", ":7946"))) == [
            f"{address}:2377",
            f"{address}:7946",
        ]
        assert oct(int(host.run("stat -c %a /etc/wireguard/swarmmail.key").stdout, 8)) == "0o600"
        assert "PrivateKey" not in host.run("cat /etc/wireguard/swarmmail.conf").stdout


def test_second_run_says_nothing_to_do_and_changes_nothing(clustered: Project) -> None:
    before = versions(clustered)
    files = {host: clustered.sh(host, "stat -c '%n %Y %i' /etc/wireguard/* /etc/swarmmail/*") for host in HOSTS}
    result = clustered.bootstrap(CLUSTER, check=0)
    assert (result.stdout, result.stderr) == ("bootstrap: nothing to do\n", "")
    assert versions(clustered) == before
    assert files == {host: clustered.sh(host, "stat -c '%n %Y %i' /etc/wireguard/* /etc/swarmmail/*") for host in HOSTS}


@pytest.mark.parametrize("words", [("bootstrap", "--plan"), ("--dry", "bootstrap")], ids=["plan", "dry"])
def test_showing_the_plan_changes_nothing(fresh: Project, words: tuple[str, ...]) -> None:
    look = "find / -xdev -newer /run/reference -not -path '/proc/*' -not -path '/var/log/*' -type f; docker network ls"
    before = {host: fresh.sh(host, f"touch /run/reference; {look}") for host in HOSTS}
    result = fresh.fab(*words, "--inventory", CLUSTER, check=0)
    for text in ("make the Swarm", "join the Swarm", "tunnel 10.", "overlay local-mail-delivery"):
        assert text in result.stdout, str(result)
    assert {host: fresh.sh(host, look) for host in HOSTS} == before
    assert [fresh.host(host).docker.info()["Swarm"]["LocalNodeState"] for host in HOSTS] == ["inactive"] * 3


def test_hosts_on_the_command_line_are_refused(lab: Project) -> None:
    result = lab.fab("-H", "host1,host2", "bootstrap", "--inventory", CLUSTER)
    assert result.status == 2
    assert result.errors == ["swarmmail: -H does not apply here: the inventory says which hosts (see --inventory)"]


def test_two_managers_become_one_and_it_says_why(fresh: Project) -> None:
    result = fresh.bootstrap(fresh.inventory("two", HOSTS[:2], managers=2), check=0)
    why = "host2 stays a worker: 2 managers tolerate no more losses than 1"
    assert any(why in event for event in result.events), str(result)
    assert {host: node[0] for host, node in swarm(fresh).items()} == {"host1": "manager", "host2": "worker"}
    # the third comes later: now there are three managers, and none had to leave
    ids = {node["ID"] for node in fresh.host("host1").docker.nodes()}
    fresh.bootstrap(CLUSTER, check=0)
    assert {host: node[:2] for host, node in swarm(fresh).items()} == dict.fromkeys(HOSTS, ("manager", "ready"))
    assert ids < {node["ID"] for node in fresh.host("host1").docker.nodes()}


def test_without_encryption_it_shouts_and_works(fresh: Project) -> None:
    inventory = fresh.inventory("clear", network={"encryption": "none"})
    result = fresh.bootstrap(inventory, check=0)
    assert any(line.startswith("warning: ") and "IN CLEAR TEXT" in line for line in result.errors), str(result)
    assert fresh.host("host2").docker.info()["Swarm"]["NodeAddr"] == fresh.address("host2")
    result = fresh.bootstrap(inventory, check=0)
    assert result.stdout == "bootstrap: nothing to do\n"
    assert any("IN CLEAR TEXT" in line for line in result.errors), "it shouts at every run"


# ---- who may do it ----


def sudo_inventory(project: Project, user: str) -> str:
    return project.inventory(user, ssh={"user": user})


def test_passwordless_sudo_is_enough(fresh: Project) -> None:
    inventory = sudo_inventory(fresh, "deploy")
    fresh.bootstrap(inventory, check=0)
    assert fresh.bootstrap(inventory, check=0).stdout == "bootstrap: nothing to do\n"


def test_sudo_with_a_password_that_is_seen_nowhere(fresh: Project) -> None:
    """Given by the environment (Fabric's configuration), without any terminal."""
    inventory = sudo_inventory(fresh, "admin")
    password = (fresh.root / ".lab" / "sudo_password").read_text().strip()
    with watched(fresh) as seen:
        result = fresh.bootstrap(inventory, env={"FABRIC_SUDO_PASSWORD": password}, check=0)
    assert password not in result.output
    assert "sudo" in seen(), "the watch saw the commands"
    assert password not in seen()
    for host in HOSTS:
        assert password not in fresh.sh(host, "journalctl --no-pager")


def test_sudo_with_a_password_asked_on_the_terminal(clustered: Project) -> None:
    inventory = sudo_inventory(clustered, "admin")
    password = (clustered.root / ".lab" / "sudo_password").read_text().strip()
    status, text = on_a_terminal(
        clustered, ["--prompt-for-sudo-password", "bootstrap", "--inventory", inventory], password
    )
    assert status == 0 and "nothing to do" in text, text
    assert password not in text, "what is typed is not shown"


def on_a_terminal(project: Project, words: list[str], answer: str) -> tuple[int, str]:
    """Run the command line on a terminal, answer the first question; its status and all that was shown."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.chdir(project.root)
        os.execve(sys.executable, [sys.executable, "-m", "fabric", *words], project.environment({"TERM": "xterm"}))
    shown, answered = b"", False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        shown += chunk
        if not answered and b"assword" in shown:
            time.sleep(0.1)
            os.write(terminal, answer.encode() + b"\n")
            answered = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


class watched:
    """Every command line that is seen on the hosts, with its environment, during a block."""

    def __init__(self, project: Project) -> None:
        self.project = project

    def __enter__(self) -> Callable[[], str]:
        for host in HOSTS:
            self.project.sh(
                host,
                "rm -f /run/watch.*; cat >/run/watch.sh <<'EOF'\n"
                "while [ ! -e /run/watch.end ]; do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '; done\n"
                "EOF\n"
                "setsid sh /run/watch.sh >/run/watch.out 2>/dev/null </dev/null &",
            )
        return lambda: "".join(self.project.sh(host, "cat /run/watch.out") for host in HOSTS)

    def __exit__(self, *_: object) -> None:
        for host in HOSTS:
            self.project.sh(host, "touch /run/watch.end")


def test_no_token_and_no_private_key_is_seen_anywhere(fresh: Project) -> None:
    with watched(fresh) as seen:
        result = fresh.bootstrap(CLUSTER, check=0, env={"SWARMMAIL_DEBUG": "1"})
    tokens = fresh.host("host1").docker.inspect_swarm()["JoinTokens"].values()
    keys = [fresh.sh(host, "cat /etc/wireguard/swarmmail.key").strip() for host in HOSTS]
    assert all(token.startswith("SWMTKN-") for token in tokens) and all(len(key) == 44 for key in keys)
    journal = "".join(fresh.sh(host, "journalctl --no-pager") for host in HOSTS)
    assert "dockerd" in journal and "wg" in seen(), "there is something to search"
    for secret in (*tokens, *keys):
        for name, text in (("output", result.output), ("journal", journal), ("process list", seen())):
            assert secret not in text, name
    assert "SWMTKN" not in seen() + journal + result.output


# ---- other ways to a host, other hosts ----


def test_a_host_behind_another_one(fresh: Project) -> None:
    """host3 is reached through host1 only."""
    fresh.sh(
        "host3",
        f"nft 'add table inet away; add chain inet away in {{ type filter hook input priority 0; }}; "
        f"add rule inet away in ip saddr {fresh.gateway} tcp dport 22 drop'",
    )
    try:
        direct = fresh.inventory("direct", ssh={"connect_timeout": 2})
        fresh.bootstrap(direct, "--plan").error("host3, ssh: ", "ssh -i")
        hosts = {"host1": {}, "host2": {}, "host3": {"jump": "host1"}}
        inventory = fresh.inventory("jump", hosts, ssh={"connect_timeout": 5})
        fresh.bootstrap(inventory, check=0)
        outside = {"host1": {}, "host2": {}, "host3": {"jump": f"root@{fresh.address('host1')}:22"}}
        outside_inventory = fresh.inventory("outside", outside, ssh={"connect_timeout": 5})
        assert fresh.bootstrap(outside_inventory, check=0).stdout == "bootstrap: nothing to do\n"
    finally:
        fresh.sh("host3", "nft delete table inet away")


@pytest.fixture(scope="module")
def crowd(place: Path) -> Iterator[Project]:
    """Five hosts, the last one bare, as a provider hands it over."""
    with temporary(place, "crowd") as project:
        project.up(4, 1)
        yield project


def test_five_hosts_of_which_one_is_bare(crowd: Project) -> None:
    """Docker and WireGuard get installed, and sshd's stock limits (MaxStartups 10:30:100) are enough."""
    names = [machine.name for machine in crowd.machines]
    assert names == ["host1", "host2", "host3", "host4", "bare1"]
    result = crowd.bootstrap(crowd.inventory("crowd", names), check=0, timeout=240)
    assert "install docker.io wireguard-tools wireguard-go" in result.stdout, str(result)
    roles = {host: node[:2] for host, node in swarm(crowd).items()}
    assert roles == {
        "host1": ("manager", "ready"),
        "host2": ("manager", "ready"),
        "host3": ("manager", "ready"),
        "host4": ("worker", "ready"),
        "bare1": ("worker", "ready"),
    }
    assert crowd.sh("bare1", "systemctl is-enabled docker") == "enabled\n"
    assert crowd.bootstrap("crowd", check=0).stdout == "bootstrap: nothing to do\n"


# ---- what mends itself, and what a second run mends ----


def guarded(project: Project, host: str) -> bool:
    return project.sh(host, "/etc/swarmmail/guard check && echo yes", check=False) == "yes\n"


def test_a_flushed_firewall_gets_its_guard_back_by_itself(clustered: Project) -> None:
    clustered.sh("host2", "nft flush ruleset")
    eventually(lambda: guarded(clustered, "host2"), 30)


def test_a_firewall_reload_gets_its_guard_back_by_itself(clustered: Project) -> None:
    """What `systemctl reload nftables` does with Debian's stock configuration."""
    clustered.sh("host2", "nft -f /etc/nftables.conf")
    eventually(lambda: guarded(clustered, "host2"), 30)


def test_one_rule_of_the_guard_taken_out_comes_back_by_itself(clustered: Project) -> None:
    clustered.sh("host2", "nft flush chain inet swarmmail in")
    eventually(lambda: guarded(clustered, "host2"), 30)


def test_a_deleted_blackhole_route_comes_back_by_itself(clustered: Project) -> None:
    before = clustered.sh("host3", "ip -4 route show type blackhole")
    assert before.startswith("blackhole 10.")
    clustered.sh("host3", "ip -4 route flush type blackhole")
    eventually(lambda: clustered.sh("host3", "ip -4 route show type blackhole") == before, 30)


def test_a_killed_guard_comes_back_by_itself(clustered: Project) -> None:
    clustered.sh("host2", "systemctl kill -s KILL swarmmail-guard; sleep 0.1; nft flush ruleset")
    eventually(lambda: guarded(clustered, "host2"), 30)
    clustered.sh("host2", "sleep 1.5; pkill -x nft; nft flush ruleset")  # only one of its ears
    eventually(lambda: guarded(clustered, "host2"), 30)


def repaired(project: Project, *parts: str) -> Result:
    """Run bootstrap; it had to do these things (patterns of its plan), and then nothing is left to do."""
    result = project.bootstrap(CLUSTER, check=0)
    for part in parts:
        assert re.search(part, result.stdout), f"{part} not in the plan: {result}"
    assert project.bootstrap(CLUSTER, check=0).stdout == "bootstrap: nothing to do\n"
    project.known.remember("hosts")
    return result


@pytest.fixture
def one_manager(fresh: Project) -> Iterator[Project]:
    """A cluster whose tunnel can be cut without a vote: three managers that lose their leader take up to minutes."""
    fresh.inventory(CLUSTER, managers=1)
    fresh.bootstrap(CLUSTER, check=0)
    yield fresh
    fresh.inventory(CLUSTER)


def test_a_stopped_tunnel_is_mended(one_manager: Project) -> None:
    one_manager.sh("host3", "systemctl stop wg-quick@swarmmail")
    repaired(one_manager, r"host3 +tunnel 10\S+ \(.*the tunnel is down")


def test_a_changed_configuration_is_mended(clustered: Project) -> None:
    clustered.sh("host3", "sed -i 's/^MTU = .*/MTU = 1280/' /etc/wireguard/swarmmail.conf")
    repaired(clustered, r"host3 +tunnel 10\S+ \(configuration\)")
    assert "mtu 1320" in clustered.sh("host3", "ip link show swarmmail")


def test_a_tunnel_that_listens_elsewhere_than_its_file_says_is_mended(clustered: Project) -> None:
    clustered.sh("host3", "wg set swarmmail listen-port 51999")
    repaired(clustered, r"host3 +tunnel 10\S+ \(peers, address, port or MTU of the running tunnel\)")
    assert clustered.sh("host3", "wg show swarmmail listen-port") == "51820\n"


def test_a_worker_is_lost_and_comes_back_with_its_labels(fresh: Project) -> None:
    inventory = fresh.inventory("worker", managers=1)
    fresh.bootstrap(inventory, check=0)
    before = {node["Spec"]["Labels"].get("swarmmail.host"): node["ID"] for node in fresh.host("host1").docker.nodes()}
    fresh.sh("host1", f"docker node update --label-add swarmmail.mda=true {before['host2']}")
    fresh.sh("host2", "docker swarm leave --force")
    fresh.bootstrap(inventory, check=0)
    nodes = fresh.host("host1").docker.nodes()
    assert len(nodes) == 3, "the ghost is gone"
    after = {node["Spec"]["Labels"].get("swarmmail.host"): node for node in nodes}
    assert after["host2"]["ID"] != before["host2"]
    assert after["host2"]["Spec"]["Labels"] == {"swarmmail.host": "host2", "swarmmail.mda": "true"}
    assert after["host2"]["Status"]["State"] == "ready"
    assert fresh.bootstrap(inventory, check=0).stdout == "bootstrap: nothing to do\n"


def test_a_manager_is_lost_and_comes_back(clustered: Project) -> None:
    clustered.sh("host2", "docker swarm leave --force")
    result = repaired(clustered, "host2 +join the Swarm", "host2 +make it a manager", "host2 +remove its old node")
    assert {host: node[:2] for host, node in swarm(clustered).items()} == dict.fromkeys(HOSTS, ("manager", "ready")), (
        result
    )


def test_the_lead_is_lost_and_joins_the_others(clustered: Project) -> None:
    """The first host of the inventory must not make a second Swarm."""
    identity = clustered.host("host2").docker.inspect_swarm()["ID"]
    clustered.sh("host1", "docker swarm leave --force")
    repaired(clustered, "host1 +join the Swarm")
    assert clustered.host("host1").docker.inspect_swarm()["ID"] == identity


def test_a_role_and_labels_changed_by_hand_are_mended(clustered: Project) -> None:
    # the label first: an update beside the end of a demotion is refused ("update out of sequence")
    clustered.sh("host1", "docker node update --label-rm swarmmail.host host2 && docker node demote host3")
    repaired(clustered, "host3 +make it a manager", "host2 +label its node swarmmail.host=host2")
    assert {host: node[0] for host, node in swarm(clustered).items()} == dict.fromkeys(HOSTS, "manager")


def test_stopped_docker_is_started(clustered: Project) -> None:
    clustered.sh("host2", "systemctl stop docker.socket docker.service")
    repaired(clustered, "host2 +start Docker")


def test_two_of_three_managers_whose_docker_is_stopped_are_started(clustered: Project) -> None:
    for host in ("host1", "host3"):
        clustered.sh(host, "systemctl stop docker.socket docker.service")
    repaired(clustered, "host1 +start Docker", "host3 +start Docker")


def test_a_removed_overlay_is_made_again(clustered: Project) -> None:
    clustered.sh("host1", "docker network rm local-mail-delivery")
    repaired(clustered, "overlay local-mail-delivery")


def test_a_rebooted_host_comes_back_with_everything(clustered: Project) -> None:
    clustered.reboot("host2")
    assert guarded(clustered, "host2")
    eventually(lambda: swarm(clustered)["host2"][1] == "ready", 20, "host2 is ready again")
    assert clustered.sh("host2", "systemctl is-active wg-quick@swarmmail swarmmail-guard docker").split() == [
        "active",
        "active",
        "active",
    ]
    assert clustered.bootstrap(CLUSTER, check=0).stdout == "bootstrap: nothing to do\n"


def test_all_hosts_rebooted_at_once_come_back(clustered: Project) -> None:
    subprocess.run(["docker", "restart", "-t", "20", *map(clustered.container, HOSTS)], check=True, capture_output=True)
    clustered.disconnect()
    clustered.up()
    eventually(lambda: clustered.bootstrap(CLUSTER, "--plan").stdout == "", 30, "nothing is left to do")
    assert all(guarded(clustered, host) for host in HOSTS)


# ---- what the wire sees ----


class Receiver:
    """A container on the overlay, on host2, and what arrives in it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        for host in ("host1", "host2"):
            run = f"docker run -qd --name probe --network local-mail-delivery {project.image(host)} sleep 600"
            anew = f"docker rm -f probe >/dev/null 2>&1; {run} >/dev/null && echo runs"
            # a node that has just joined may be too late in asking a manager for an address (20 s)
            eventually(lambda: "runs" in project.sh(host, anew, check=False), 90, f"a container on {host}")  # noqa: B023
        self.address, self.mac = self.look("host2")
        self.sender, _ = self.look("host1")
        self.vni = self.find_vni()

    def look(self, host: str) -> tuple[str, str]:
        seen = json.loads(self.project.sh(host, "docker inspect probe"))[0]["NetworkSettings"]["Networks"]
        return seen["local-mail-delivery"]["IPAddress"], seen["local-mail-delivery"]["MacAddress"]

    def find_vni(self) -> int:
        options = json.loads(self.project.sh("host1", "docker network inspect local-mail-delivery"))[0]["Options"]
        return int(options["com.docker.network.driver.overlay.vxlanid_list"])

    def within(self, host: str, command: str, check: bool = True) -> str:
        """Run a program of the host in the container's network."""
        return self.project.sh(
            host, f"nsenter -t $(docker inspect -f '{{{{.State.Pid}}}}' probe) -n {command}", check=check
        )

    def reached_by_the_sender(self) -> bool:
        return " 0% packet loss" in self.within("host1", f"ping -c2 -i0.2 -W1 {self.address}", check=False)

    def arrivals(self, send: Callable[[], object]) -> int:
        """How many UDP datagrams to port 9999 arrive in the container, of those that ``send`` sends."""
        self.within(
            "host2",
            "sh -c 'timeout 8 tcpdump -ni any -U --immediate-mode -c 50 "
            "udp dst port 9999 >/run/arrived 2>/run/listening & "
            "for i in $(seq 50); do grep -q listening /run/listening && break; sleep 0.1; done'",
        )
        send()
        time.sleep(0.5)
        self.project.sh("host2", "pkill tcpdump; true")
        time.sleep(0.1)
        return self.project.sh("host2", "cat /run/arrived").count("> " + self.address + ".9999")

    def close(self) -> None:
        for host in ("host1", "host2"):
            self.project.sh(host, "docker rm -f probe >/dev/null")


@pytest.fixture
def receiver(one_manager: Project) -> Iterator[Receiver]:
    made = Receiver(one_manager)
    yield made
    made.close()


def forged(receiver: Receiver, source: str, target: str) -> bytes:
    """A VXLAN packet (RFC 7348) as a stranger makes it, whole, from the IP header on."""
    from scapy.all import IP, UDP, Ether, Raw, raw  # type: ignore[attr-defined]
    from scapy.layers.vxlan import VXLAN as Vxlan

    return bytes(
        raw(
            IP(src=source, dst=target)
            / UDP(sport=40000, dport=VXLAN)
            / Vxlan(vni=receiver.vni, flags="Instance")
            / Ether(src=STRANGER, dst=receiver.mac)
            / IP(src=receiver.sender, dst=receiver.address)
            / UDP(sport=1234, dport=9999)
            / Raw(b"forged")
        )
    )


def send_raw(project: Project, packet: bytes, host: str | None = None) -> None:
    """Send a packet with an IP header of one's own, five times: from this machine, or from a host."""
    text = base64.b64encode(packet).decode()
    program = (
        "import base64, socket, sys\n"
        f"packet = base64.b64decode({text!r})\n"
        "out = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n"
        "target = socket.inet_ntoa(packet[16:20])\n"
        "for _ in range(5): out.sendto(packet, (target, 0))\n"
    )
    if host is None:
        subprocess.run([sys.executable, "-c", program], check=True)
    else:
        project.sh(host, f"python3 - <<'EOF'\n{program}EOF")


def test_a_forged_vxlan_packet_reaches_no_container(receiver: Receiver) -> None:
    """From a stranger, under its own address and under that of a member of the Swarm. That the same packets do
    arrive without the guard shows that they are made right."""
    project = receiver.project
    assert receiver.reached_by_the_sender()
    packets = [
        forged(receiver, project.gateway, project.address("host2")),
        forged(receiver, project.address("host1"), project.address("host2")),
    ]

    def send() -> None:
        for packet in packets:
            send_raw(project, packet)

    assert receiver.arrivals(send) == 0
    project.sh("host2", "systemctl stop swarmmail-guard; nft delete table inet swarmmail")
    try:
        assert receiver.arrivals(send) >= 5, "the forgery is made right: without the guard it arrives"
    finally:
        project.sh("host2", "systemctl start swarmmail-guard")
    eventually(lambda: guarded(project, "host2"), 30)
    assert receiver.arrivals(send) == 0


def test_nothing_leaves_in_clear_when_the_tunnel_is_down(receiver: Receiver) -> None:
    project = receiver.project
    assert receiver.reached_by_the_sender()
    capture = subprocess.Popen(
        ["tcpdump", "-ni", project.bridge, "-U", "--immediate-mode", "udp", "port", str(VXLAN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert capture.stderr is not None
    assert "listening" in capture.stderr.readline() + capture.stderr.readline()
    try:
        project.sh("host1", "systemctl stop wg-quick@swarmmail")
        assert not receiver.reached_by_the_sender()
        # not even when one of the two defences is gone
        project.sh("host1", "systemctl stop swarmmail-guard; nft delete table inet swarmmail")
        assert not receiver.reached_by_the_sender()
        project.sh(
            "host1", "ip -4 route flush type blackhole; /etc/swarmmail/guard apply; ip -4 route flush type blackhole"
        )
        assert not receiver.reached_by_the_sender()
    finally:
        time.sleep(0.3)
        capture.terminate()
        seen, _ = capture.communicate()
    assert seen.strip() == ""
    repaired(project, "host1 +tunnel .*the tunnel is down.*the guard is not in force")
    eventually(receiver.reached_by_the_sender, 60, "the overlay works again")
