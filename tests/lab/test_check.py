"""``fab check``: a clean lab is called clean, each planted fault is called by its name and host, what is printed as
its mend mends it, and nothing is left behind.

Faults that do not meet are planted together: one run sees them all, then every mend is carried out as printed, and a
second run must not find them any more.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import pytest
from conftest import CLUSTER, HOSTS, STACK, Project

pytestmark = pytest.mark.lab
Found = dict[str, Any]


def check(project: Project, inventory: str, *words: str, status: int | None = None) -> list[Found]:
    result = project.fab("check", "--json", "--inventory", inventory, *words, timeout=90)
    assert "Traceback" not in result.output and "this should not happen" not in result.output, str(result)
    document = json.loads(result.stdout)
    assert document["status"] == result.status
    if status is not None:
        bad = [f for f in document["findings"] if f["level"] in ("warning", "error")]
        assert result.status == status, json.dumps(bad, indent=2)
    found: list[Found] = document["findings"]
    return found


def everywhere(project: Project, script: str) -> dict[str, str]:
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        return dict(zip(HOSTS, pool.map(lambda host: project.sh(host, script, check=False), HOSTS), strict=True))


SNAPSHOT = """export PATH=$PATH:/usr/sbin
ip -br link | awk '{print $1}'; ip -4 route show table all; ip rule
ss -Hlnptu | awk '{print $1, $5, $7}' | sort
ip xfrm state; ip xfrm policy
nft -s list ruleset | sed 's/packets [0-9]* bytes [0-9]*//'
iptables-save | grep -c -- -A
find /run /tmp /var/tmp -path /run/systemd -prune -o -path /run/user -prune -o -path /run/log -prune \
  -o -path '/run/docker/*' -prune -o -path '/run/containerd/*' -prune -o -print | sort
ip netns list; ps -eo comm= | grep -E 'python|wireguard|unshare|tcpdump|sleep' | sort
true"""


def assert_clean(found: list[Found]) -> None:
    bad = [f for f in found if f["level"] in ("warning", "error")]
    assert not bad, json.dumps(bad, indent=2)
    pairs = [f for f in found if f["what"] == "pair"]
    assert len(pairs) == 6 and all(f["level"] == "ok" for f in pairs), pairs
    assert all("1 MB by" in f["measured"] and "path MTU" in f["measured"] for f in pairs), pairs


def test_a_clean_lab_before_bootstrap_and_nothing_left_behind(fresh: Project) -> None:
    inventory = fresh.inventory("check", stack=STACK)
    fresh.fab("check", "--inventory", inventory, check=0)  # what Docker and sshd make at their first use is there now
    before = everywhere(fresh, SNAPSHOT)
    assert_clean(check(fresh, inventory, "--strict", status=0))
    assert everywhere(fresh, SNAPSHOT) == before


def test_a_clean_lab_with_mail_running(deployed: Project) -> None:
    before = everywhere(deployed, SNAPSHOT)
    tasks = everywhere(deployed, "docker ps -q --no-trunc | sort")
    assert_clean(check(deployed, "mail", "--strict", status=0))
    assert everywhere(deployed, SNAPSHOT) == before
    assert everywhere(deployed, "docker ps -q --no-trunc | sort") == tasks


def test_a_killed_check_leaves_nothing(fresh: Project) -> None:
    inventory = fresh.inventory("check", stack=STACK)
    before = everywhere(fresh, SNAPSHOT)
    process = fresh.start("check", "--inventory", inventory)
    try:
        for _ in range(600):
            if any("wireguard-go" in text for text in everywhere(fresh, "ps -eo comm=").values()):
                break
            assert process.poll() is None, "it ended before its tunnels stood"
        process.kill()
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 30
    while (after := everywhere(fresh, SNAPSHOT)) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert after == before


def test_first_handshakes_that_are_lost_are_no_fault(clustered: Project) -> None:
    """Two that cross may both be lost, and WireGuard waits 5 s before the next."""
    clustered.sh(
        "host2",
        "nft 'add table inet lossy; add chain inet lossy in { type filter hook prerouting priority -400; }; "
        "add rule inet lossy in udp dport 51820 drop; add rule inet lossy in udp sport 51820 drop'; "
        "(umask 077; wg showconf swarmmail >/run/kept; wg setconf swarmmail /run/kept; rm /run/kept); "
        "(sleep 8; nft delete table inet lossy) >/dev/null 2>&1 &",
    )
    found = check(clustered, CLUSTER, "--strict", status=0)
    assert sum("1 MB by the running tunnel" in f["measured"] for f in found if f["what"] == "pair") == 6


def test_a_table_for_people(fresh: Project) -> None:
    inventory = fresh.inventory("check", stack=STACK)
    fresh.sh("host2", "systemctl disable docker 2>/dev/null")
    try:
        result = fresh.fab("check", "--inventory", inventory, check=0)
        assert re.search(
            r"warning: host2, docker at boot: .*\n  why: .*\n  mend on host2: systemctl enable docker", result.stdout
        )
        assert fresh.fab("check", "--strict", "--inventory", inventory).status == 1
    finally:
        fresh.sh("host2", "systemctl enable docker 2>/dev/null")


def test_hosts_without_docker_and_one_behind_nat(make_project: Callable[[str], Project]) -> None:
    """As a provider hands them over; and what a translating router does to packets that nobody inside asked for."""
    project = make_project("bare")
    project.up(1, 2)
    hosts = {"bare1": {}, "bare2": {"role": "worker", "nat": True}}
    project.sh(
        "bare2",
        "nft 'add table inet router; add chain inet router in { type filter hook input priority -10; }; "
        f"add rule inet router in ip saddr {project.address('bare1')} ct state != established drop'",
    )
    found = check(project, project.inventory("bare", hosts, managers=1), "--strict", status=0)
    notes = {(f["where"], f["what"]): f["measured"] for f in found if f["level"] == "note"}
    assert notes["bare1", "engine"] == "no Docker yet"
    assert "its program is missing" in notes["bare1", "kernel"]
    assert "no wireguard-tools" in notes["bare1 -> bare2", "1 MB by a tunnel"]
    good = {f["where"]: f["measured"] for f in found if f["what"] == "pair"}
    assert "UDP 51820" in good["bare2 -> bare1"] and "bare1 -> bare2" not in good
    open_ = check(project, project.inventory("open", ["bare1", "bare2"], managers=1))
    assert [(f["where"], f["what"]) for f in open_ if f["level"] == "error"] == [("bare1 -> bare2", "UDP 51820")]


def test_a_host_behind_nat_takes_part_in_the_transfer(fresh: Project) -> None:
    others = ", ".join(fresh.address(host) for host in ("host1", "host2"))
    fresh.sh(
        "host3",
        "nft 'add table inet router; add chain inet router in { type filter hook input priority -10; }; "
        f"add rule inet router in ip saddr {{ {others} }} ct state != established drop'",
    )
    try:
        hosts = {"host1": {}, "host2": {}, "host3": {"role": "worker", "nat": True}}
        found = check(fresh, fresh.inventory("nat", hosts, managers=2), status=0)
        assert sum("1 MB by" in f["measured"] for f in found if f["what"] == "pair") == 6
    finally:
        fresh.sh("host3", "nft delete table inet router")


# ---- planted faults ----
# Docker remembers where iptables was when it started: one that lies is planted where nothing restarts Docker.


@dataclass(frozen=True)
class Fault:
    """``plant`` and ``clean`` are run on ``host``. A finding must have ``what`` and ``where`` (default: the host) and
    match ``says``; its mend must match ``mend``. ``instead``: run this where the printed mend can't work in a container
    (a kernel module, a package from the network, an edit of the inventory)."""

    name: str
    host: str
    plant: str
    what: str
    says: str
    mend: str
    where: str = ""
    clean: str = ""
    level: str = "error"
    instead: str | None = None

    def matching(self, found: list[Found]) -> list[Found]:
        return [
            f
            for f in found
            if f["level"] == self.level
            and f["what"] == self.what
            and re.fullmatch(self.where or self.host, f["where"])
            and re.search(self.says, f["measured"])
        ]


@dataclass
class Seen:
    first: list[Found] = field(default_factory=list)
    second: list[Found] = field(default_factory=list)
    applied: dict[str, list[str]] = field(default_factory=dict)


def plant(project: Project, faults: list[Fault], scripts: Mapping[str, str]) -> None:
    """On all hosts at once, in order on each."""

    def one(host: str) -> None:
        for fault in faults:
            if fault.host == host and scripts[fault.name]:
                project.sh(host, "export PATH=$PATH:/usr/sbin\n" + scripts[fault.name])

    with ThreadPoolExecutor(len(HOSTS)) as pool:
        list(pool.map(one, HOSTS))


def run(project: Project, faults: list[Fault], inventory: str, mended: str | None = None) -> Seen:
    seen = Seen()
    try:
        plant(project, faults, {f.name: f.plant for f in faults})
        seen.first = check(project, inventory)
        for fault in faults:
            for found in fault.matching(seen.first):
                command = fault.instead if fault.instead is not None else found["mend"]
                on = fault.host if fault.instead is not None else found["on"]
                if command:
                    project.sh(on, "export PATH=$PATH:/usr/sbin\n" + command, check=False)
                seen.applied.setdefault(fault.name, []).append(f"{on}: {command}")
        seen.second = check(project, mended or inventory)
    finally:
        plant(project, faults, {f.name: f.clean for f in faults})
    return seen


LISTENS = "for i in $(seq 200); do ss -Hlntu | grep -q ':{} ' && break; sleep 0.05; done"


def listener(kind: str, port: int) -> str:
    listen = "s.listen();" if kind == "STREAM" else ""
    reuse = "s.setsockopt(1,2,1);"  # SO_REUSEADDR: a Swarm of before may have left connections that have ended
    bound = f"s=socket.socket(type=socket.SOCK_{kind});{reuse}s.bind(('',{port}));{listen}"
    code = f"import socket,time;{bound}time.sleep(300)"
    return f'setsid python3 -c "{code}" >/dev/null 2>&1 </dev/null & echo $! >/root/listener; {LISTENS.format(port)}'


def config(text: str, restart: bool = False) -> str:
    return f"mkdir -p /etc/docker; echo '{text}' >/etc/docker/daemon.json" + (
        "; systemctl restart docker" if restart else ""
    )


NO_CONFIG = "rm -f /etc/docker/daemon.json*; systemctl reset-failed docker; systemctl start docker"
NO_LISTENER = "kill $(cat /root/listener) 2>/dev/null || true"
NO_RULES = "iptables -F INPUT; iptables -F OUTPUT; iptables -P INPUT ACCEPT"


def faults_before() -> list[Fault]:
    """On hosts without a Swarm, back end WireGuard."""
    return [
        Fault(
            "live-restore",
            "host1",
            config('{"live-restore": true}', True),
            "daemon configuration",
            "live-restore is on",
            "python3 -c .*live-restore.* && systemctl restart docker",
            clean=NO_CONFIG,
        ),
        Fault(
            "broken JSON",
            "host2",
            config('{"debug": true,}'),
            "daemon configuration",
            "no JSON object",
            "mv /etc/docker/daemon.json",
            clean=NO_CONFIG,
        ),
        Fault(
            "flag and file",
            "host3",
            config('{"hosts": ["fd://"]}'),
            "daemon configuration",
            "both as a flag and in the configuration file: hosts",
            "python3 -c .*hosts",
            clean=NO_CONFIG,
        ),
        Fault(
            "same host name",
            "host2",
            "hostname host1",
            "host name",
            "host1, the same as host1",
            "echo host2 >/etc/hostname",
            level="warning",
            clean="hostname host2",
        ),
        Fault(
            "same machine-id",
            "host3",
            "cp -p /etc/machine-id /root/id; echo @MACHINE@ >/etc/machine-id",
            "machine-id",
            "the same as host1",
            "systemd-machine-id-setup",
            level="warning",
            clean="cp -p /root/id /etc/machine-id",
        ),
        Fault(
            "same engine id",
            "host3",
            "cp -p /var/lib/docker/engine-id /root/engine; printf @ENGINE@ >/var/lib/docker/engine-id; "
            "mv /etc/docker/daemon.json /root/; systemctl restart docker; mv /root/daemon.json /etc/docker/",
            "engine id",
            "the same as host1",
            "rm -f .*engine-id && systemctl restart docker",
            level="warning",
        ),
        Fault(
            "no resolver",
            "host2",
            "cp /etc/resolv.conf /root/resolv.conf; : >/etc/resolv.conf",
            "resolvers",
            "no nameserver",
            "echo 'nameserver .*' >>/etc/resolv.conf",
            level="warning",
            clean="cat /root/resolv.conf >/etc/resolv.conf",
        ),
        Fault(
            "leased address",
            "host3",
            "ip addr change @HOST3@/24 dev eth0 valid_lft 86400 preferred_lft 86400",
            "address",
            "lent by DHCP",
            "ip addr change .* valid_lft forever",
            level="warning",
            clean="ip addr change @HOST3@/24 dev eth0 valid_lft forever preferred_lft forever",
        ),
        Fault(
            "port 25 taken",
            "host1",
            listener("STREAM", 25),
            "published ports",
            r"TCP 25 \(mta\) is in use by python3",
            r"kill \d+",
            clean=NO_LISTENER,
        ),
        Fault(
            "tunnel's port taken",
            "host2",
            listener("DGRAM", 51820),
            "ports",
            "UDP 51820 is in use by python3",
            r"kill \d+",
            clean=NO_LISTENER,
        ),
        Fault(
            "gossip's port taken",
            "host3",
            listener("STREAM", 7946),
            "ports",
            "TCP 7946 is in use by python3",
            r"kill \d+",
            clean=NO_LISTENER,
        ),
        Fault(
            "disabled at boot",
            "host1",
            "systemctl disable docker 2>/dev/null",
            "docker at boot",
            "disabled",
            "systemctl enable docker",
            level="warning",
            clean="systemctl enable docker 2>/dev/null",
        ),
        Fault(
            "no tcpdump",
            "host3",
            "mv /usr/bin/tcpdump /root/",
            "tcpdump",
            "missing",
            "apt-get install .* tcpdump",
            level="warning",
            instead="mv /root/tcpdump /usr/bin/",
            clean="mv -n /root/tcpdump /usr/bin/ 2>/dev/null || true",
        ),
        Fault(
            "both iptables",
            "host1",
            "iptables -A FORWARD -j ACCEPT; iptables-legacy -A INPUT -p tcp --dport 9 -j DROP",
            "iptables flavours",
            "1 rules of iptables-legacy",
            "iptables-legacy -t .t -F",
            level="warning",
            clean="iptables-legacy -F; iptables -D FORWARD -j ACCEPT",
        ),
        Fault(
            "nftables flushes",
            "host2",
            "cp /etc/nftables.conf /root/; systemctl enable nftables 2>/dev/null",
            "firewall",
            "flush ruleset",
            "sed -i .*nftables.conf",
            level="warning",
            clean="cp /root/nftables.conf /etc/; systemctl disable nftables 2>/dev/null",
        ),
        Fault(
            "unattended upgrades",
            "host3",
            "cp /var/lib/dpkg/status /root/; printf '\\nPackage: unattended-upgrades\\nStatus: install ok installed\\n"
            "Maintainer: x\\nArchitecture: all\\nVersion: 1\\nDescription: x\\n\\n' >>/var/lib/dpkg/status; "
            "echo 'APT::Periodic::Unattended-Upgrade \"1\";' >/etc/apt/apt.conf.d/99try; "
            "t=apt-daily-upgrade.timer; systemctl unmask $t 2>/dev/null; systemctl enable $t 2>/dev/null",
            "unattended upgrades",
            "docker.io",
            "apt-mark hold .*docker.io",
            level="warning",
            clean="apt-mark unhold docker.io containerd runc >/dev/null; cp /root/status /var/lib/dpkg/status; "
            "rm /etc/apt/apt.conf.d/99try; systemctl mask apt-daily-upgrade.timer 2>/dev/null",
        ),
        Fault(
            # a clock that is 100 s ahead until it is set
            "clock",
            "host2",
            'printf \'#!/bin/sh\\n[ "$1" = -s ] && exec rm -f /usr/local/sbin/date\\n'
            'n=$(/bin/date "$@"); case $1 in +%%s) echo $(( $n + 100 )) ;; '
            "+%%s.*) echo $(( ${n%%%%.*} + 100 )).${n#*.} ;; *) echo $n ;; esac\\n' "
            ">/usr/local/sbin/date; chmod +x /usr/local/sbin/date",
            "clock",
            r"\+(99|100)\.\d\d s from",
            "date -s @",
            clean="rm -f /usr/local/sbin/date",
        ),
        Fault(
            "no nftables in the kernel",
            "host1",
            "printf '#!/bin/sh\\ncase $1 in add*) echo Error: not supported >&2; exit 1;; esac\\n"
            'exec /usr/sbin/nft "$@"\\n\''
            " >/usr/local/sbin/nft; chmod +x /usr/local/sbin/nft",
            "kernel",
            "does not take the guard's nftables rule: Error: not supported",
            "modprobe -a nf_tables",
            instead="rm /usr/local/sbin/nft",
            clean="rm -f /usr/local/sbin/nft",
        ),
        Fault(
            "tunnel's port dropped",
            "host1",
            "iptables -A INPUT -p udp --dport 51820 -j DROP",
            "UDP 51820",
            "host1 drops it .ip filter INPUT: udp dport 51820 drop",
            "iptables -I INPUT -s .* --dport 51820 -j ACCEPT",
            where="host[23] -> host1",
            clean=NO_RULES,
        ),
        Fault(
            "small path",
            "host3",
            "nft 'add table inet small; add chain inet small in { type filter hook prerouting priority raw; }; "
            "add rule inet small in meta l4proto udp meta length > 1330 drop'",
            "path MTU",
            "13[23][0-9] bytes pass, the overlay is made for 1400",
            "network.mtu: 13[23][0-9]$",
            where="host[12] -> host3",
            instead="",
            clean="nft delete table inet small",
        ),
    ]


def faults_without_encryption() -> list[Fault]:
    return [
        Fault(
            "iptables off",
            "host1",
            config('{"iptables": false}'),
            "daemon configuration",
            "iptables is false",
            "python3 -c .*iptables",
            clean=NO_CONFIG,
        ),
        Fault(
            "userns-remap",
            "host2",
            config('{"userns-remap": "default"}'),
            "daemon configuration",
            "userns-remap is on",
            "python3 -c .*userns-remap",
            level="warning",
            clean=NO_CONFIG,
        ),
        Fault(
            "unknown key",
            "host3",
            config('{"log-drivr": "journald"}'),
            "daemon configuration",
            "match any configuration option: log-drivr",
            "python3 -c .*log-drivr",
            clean=NO_CONFIG,
        ),
        Fault(
            "a firewall that lets nothing in",
            "host1",
            "nft 'add table inet strict; add chain inet strict in { type filter hook input priority 0; policy drop; }; "
            "add rule inet strict in ct state established,related accept; add rule inet strict in iifname lo accept; "
            "add rule inet strict in tcp dport 22 accept'",
            "TCP 2377",
            "no answer: host1 drops it .inet strict in: policy drop",
            "nft insert rule inet strict in ip saddr .* tcp dport 2377 accept",
            where="host[23] -> host1",
            clean="nft delete table inet strict",
        ),
        Fault(
            "the same, gossip",
            "host1",
            "",
            "UDP 7946",
            "host1 drops it .inet strict in: policy drop",
            "nft insert rule inet strict in .* udp dport 7946 accept",
            where="host[23] -> host1",
        ),
        Fault(
            "the same, data port",
            "host1",
            "",
            "UDP 4789",
            "host1 drops it",
            "nft insert rule .* udp dport 4789 accept",
            where="host[23] -> host1",
        ),
        Fault(
            "the same, TCP gossip",
            "host1",
            "",
            "TCP 7946",
            "host1 drops it",
            "nft insert rule .* tcp dport 7946 accept",
            where="host[23] -> host1",
        ),
        Fault(
            "refused",
            "host3",
            "iptables -A INPUT -p tcp --dport 2377 -j REJECT",
            "TCP 2377",
            "refused: host3 drops it",
            "iptables -I INPUT -s .* --dport 2377 -j ACCEPT",
            where="host[12] -> host3",
            clean=NO_RULES,
        ),
        Fault(
            "dropped on the way out",
            "host2",
            "iptables -A OUTPUT -p udp --dport 4789 -j DROP",
            "UDP 4789",
            "host2 drops it .ip filter OUTPUT",
            "iptables -I OUTPUT -d .* --dport 4789 -j ACCEPT",
            where="host2 -> host3",
            clean=NO_RULES,
        ),
        Fault(
            "NAT",
            "host3",
            "ip addr add @SPARE@/24 dev eth0; "
            "iptables -t nat -A POSTROUTING -p udp --dport 7946 -j SNAT --to-source @SPARE@",
            "NAT",
            "is seen as .*: a router translates",
            "network.encryption: wireguard",
            where="host3 -> host[12]",
            instead="",
            clean="iptables -t nat -F POSTROUTING; ip addr del @SPARE@/24 dev eth0",
        ),
        Fault(
            "network over the resolver",
            "host3",
            "docker network create --subnet @RESOLVERS@ cover >/dev/null",
            "subnets",
            "Docker's network cover .* holds resolver",
            "docker network rm cover",
            clean="docker network rm cover >/dev/null 2>&1 || true",
        ),
    ]


def faults_with_ipsec() -> list[Fault]:
    """The lab's kernel has no ESP, which is a finding of its own; what does not need it is looked at all the same."""
    return [
        Fault(
            "no ESP in the kernel",
            "host2",
            "",
            "kernel",
            "an ESP state with AES-GCM: ",
            "modprobe -a esp4 gcm seqiv",
            instead="",
        ),
        Fault(
            "nftables backend",
            "host1",
            config('{"firewall-backend": "nftables"}'),
            "daemon configuration",
            'firewall-backend is "nftables"',
            "python3 -c .*firewall-backend",
            clean=NO_CONFIG,
        ),
        Fault(
            "pool over the hosts",
            "host3",
            config('{"default-address-pools": [{"base": "198.18.0.0/15", "size": 24}]}'),
            "address pools",
            "198.18.0.0/15, which holds host1's address",
            "python3 -c .*default-address-pools",
            clean=NO_CONFIG,
        ),
        Fault(
            "ESP dropped",
            "host3",
            "iptables -A INPUT -p esp -j DROP",
            "ESP",
            "IP protocol 50 .* does not arrive: host3 drops it .ip filter INPUT: ip protocol esp drop",
            "iptables -I INPUT -s .* -p esp -j ACCEPT",
            where="host1 -> host3",
            clean=NO_RULES,
        ),
        Fault(
            "no policy match",
            "host2",
            'printf \'#!/bin/sh\\ncase "$*" in *policy*) echo No chain/target/match by that name >&2; exit 1;; esac\\n'
            'exec /usr/sbin/iptables "$@"\\n\' >/usr/local/sbin/iptables; chmod +x /usr/local/sbin/iptables',
            "kernel",
            "an iptables rule with -m policy: No chain/target/match",
            "modprobe -a xt_policy",
            instead="rm /usr/local/sbin/iptables",
            clean="rm -f /usr/local/sbin/iptables",
        ),
        Fault(
            "data port open to all",
            "host1",
            "/usr/sbin/iptables -I INPUT -p udp --dport 4789 -j ACCEPT",
            "data port",
            "lets UDP 4789 in for all",
            "nft delete rule ip filter INPUT handle",
            level="warning",
            clean=NO_RULES,
        ),
        Fault(
            "an engine of the list",
            "host3",
            "",
            "engine version",
            "CVE-2026-92542",
            "iptables -I OUTPUT -p udp --dport 4789 -m owner --socket-exists -j DROP",
            level="warning",
            clean=NO_RULES,
        ),
        Fault(
            "no python",
            "host2",
            "mv /usr/bin/python3 /root/",
            "python3",
            "missing",
            "apt-get install .*python3-minimal",
            level="warning",
            instead="mv /root/python3 /usr/bin/",
            clean="mv -n /root/python3 /usr/bin/ 2>/dev/null || true",
        ),
        Fault(
            "address that it does not have",
            "host2",
            "",
            "address",
            "advertise @SPARE@ is on none of its links",
            "hosts.host2.advertise: @HOST2@",
            instead="",
        ),
    ]


def faults_while_it_runs() -> list[Fault]:
    return [
        Fault(
            "tunnel down",
            "host2",
            "systemctl stop wg-quick@swarmmail",
            "tunnel",
            "configured, but down",
            "systemctl restart wg-quick@swarmmail",
            level="warning",
            clean="systemctl start wg-quick@swarmmail",
        ),
        Fault(
            "guard lifted",
            "host3",
            "systemctl stop swarmmail-guard; nft delete table inet swarmmail",
            "guard",
            "not in force",
            "/etc/swarmmail/guard apply",
            level="warning",
            clean="systemctl start swarmmail-guard",
        ),
        Fault(
            "dropped inside the tunnel",
            "host1",
            "iptables -I INPUT -i swarmmail -p tcp --dport 7946 -j DROP",
            "inside the tunnel",
            "drops TCP 7946",
            "iptables -I INPUT -i swarmmail -j ACCEPT",
            clean=NO_RULES,
        ),
        Fault(
            "a route into the overlay",
            "host2",
            "ip route add @OVERLAY@ via @GATEWAY@",
            "subnets",
            "lies in the overlay",
            "ip route del",
            clean="ip route del @OVERLAY@ 2>/dev/null || true",
        ),
        Fault(
            "another host's address",
            "host3",
            "ip addr add @HOST2@/32 dev lo",
            "address of another host",
            "what host2 advertises",
            "ip addr del .*/32 dev lo",
            clean="ip addr del @HOST2@/32 dev lo 2>/dev/null || true",
        ),
    ]


def filled(project: Project, faults: list[Fault], **more: str) -> list[Fault]:
    """Put in what is known only when the lab is there."""
    resolver = project.sh("host3", "awk '/^nameserver/ {print $2; exit}' /etc/resolv.conf").strip()
    values = {
        "@MACHINE@": project.sh("host1", "cat /etc/machine-id").strip(),
        "@ENGINE@": project.sh("host1", "docker info -f '{{.ID}}'").strip(),
        "@RESOLVERS@": str(ip_network(f"{resolver}/28", strict=False)),
        "@HOST2@": project.address("host2"),
        "@HOST3@": project.address("host3"),
        "@SPARE@": spare(project),
        "@GATEWAY@": project.gateway,
        **more,
    }

    def fill(text: Any) -> Any:
        if isinstance(text, str):
            for mark, value in values.items():
                text = text.replace(mark, value)
        return text

    return [Fault(**{key: fill(value) for key, value in vars(fault).items()}) for fault in faults]


def spare(project: Project) -> str:
    return project.gateway.rsplit(".", 1)[0] + ".99"


@pytest.fixture(scope="module")
def planted(_hosts: Project) -> Iterator[dict[str, tuple[Fault, Seen]]]:
    """Every fault, with what two runs said: one with it, one after its mend."""
    project, results = _hosts, {}

    def batch(faults: list[Fault], inventory: str, mended: str | None = None, **more: str) -> None:
        ready = filled(project, faults, **more)
        seen = run(project, ready, inventory, mended)
        results.update({fault.name: (fault, seen) for fault in ready})

    project.reset()
    before = project.inventory("check", stack=STACK)
    narrow = project.inventory("narrow", stack=STACK, network={"mtu": 1324})
    batch(faults_before(), before, narrow)
    plain = project.inventory("plain", network={"encryption": "none"})
    batch(faults_without_encryption(), plain)
    wrong = {"host1": {}, "host2": {"advertise": spare(project)}, "host3": {}}
    batch(
        faults_with_ipsec(),
        project.inventory("ipsec", wrong, network={"encryption": "ipsec"}),
        project.inventory("right", network={"encryption": "ipsec"}),
    )
    project.reset()
    cluster = project.inventory("cluster")
    project.bootstrap(cluster, check=0)
    overlay = project.sh("host1", "docker network inspect local-mail-delivery -f '{{(index .IPAM.Config 0).Subnet}}'")
    batch(faults_while_it_runs(), cluster, **{"@OVERLAY@": overlay.strip()})
    yield results
    project.reset()


ALL = [
    fault.name
    for faults in (faults_before(), faults_without_encryption(), faults_with_ipsec(), faults_while_it_runs())
    for fault in faults
]


def test_there_are_enough_and_each_has_its_own_name() -> None:
    assert len(ALL) >= 20 and len(set(ALL)) == len(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_planted_fault(planted: dict[str, tuple[Fault, Seen]], name: str) -> None:
    fault, seen = planted[name]
    near = [f for f in seen.first if f["what"] == fault.what or (fault.host in f["where"] and f["level"] != "ok")]
    found = fault.matching(seen.first)
    assert found, json.dumps(near, indent=2)
    for one in found:
        assert one["why"] and re.search(fault.mend, one["mend"]), one
    left = fault.matching(seen.second)
    if fault.name in ("no ESP in the kernel", "NAT"):
        return  # the kernel stays as it is; and what mends the other is another inventory, tried below
    assert not left, f"still there after {seen.applied[name]}: {json.dumps(left, indent=2)}"


def test_what_translates_is_no_fault_with_wireguard(fresh: Project) -> None:
    nat = next(f for f in filled(fresh, faults_without_encryption()) if f.name == "NAT")
    try:
        plant(fresh, [nat], {nat.name: nat.plant})
        assert_clean(check(fresh, fresh.inventory("check", stack=STACK), status=0))
    finally:
        plant(fresh, [nat], {nat.name: nat.clean})
