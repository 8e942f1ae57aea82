"""``fab check``: what was measured to findings, without a host."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
from builders import address, make_facts, make_inventory
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmmail.cluster import bootstrap as work
from swarmmail.cluster import check as cluster
from swarmmail.model import bootstrap, check, check_mail, check_pair, engines, findings
from swarmmail.model.bootstrap import Observed
from swarmmail.model.check import Measured, Probe, Published
from swarmmail.model.check_pair import End
from swarmmail.model.errors import Refused, SwarmmailError
from swarmmail.model.facts import HostFacts
from swarmmail.model.findings import Finding, Level

NAMES = ("host1", "host2", "host3")
KERNEL = ["vxlan", "bridge", "veth", "esp", "policy", "bpf", "u32", "mark", "nat", "nft", "tun", "wireguard"]
GOOD = {
    "machine-id": "@",
    "ssh-keys": "ssh-ed25519 @",
    "container": "none",
    "time": "daemon=chrony\nsynchronized=yes",
    "programs": "/usr/bin/python3\n/usr/bin/tcpdump\n/usr/sbin/nft\n/usr/bin/wg\n/usr/bin/wireguard-go",
    "python": "3.13",
    "docker-path": "/usr/bin/docker",
    "version": '{"ApiVersion": "1.45", "MinAPIVersion": "1.24"}',
    "info": '{"ID": "id-@", "DockerRootDir": "/var/lib/docker", "Driver": "overlay2"}',
    "next": "/usr/sbin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock",
    "validate": "configuration OK\nstatus=0",
    "disk": f"{50 << 30} {100 << 30} 1000000 2000000 ext4 /var/lib/docker",
    "memory": "MemTotal=4000000\nMemAvailable=3000000",
    "docker-nets": "bridge 172.17.0.0/16",
    "units": "docker active enabled\nnftables inactive disabled\nufw inactive not-found\nfirewalld inactive not-found",
    "iptables": "iptables v1.8.11 (nf_tables)",
    "packages": "docker.io:\n  Installed: 26.1.5\n  Candidate: 26.1.5",
    "ipvs": "yes",
    "kernel": "\n".join(f"ok {name}" for name in KERNEL),
    "end": "",
}


def probe(name: str, **changes: str) -> Probe:
    sections = {k.replace("_", "-"): v for k, v in changes.items()}
    body = {**GOOD, **{k if k in GOOD or k not in ("daemon-json",) else "daemon.json": v for k, v in sections.items()}}
    return Probe("".join(f"\n@@{key}\n{text.replace('@', name)}\n" for key, text in body.items()))


def measured(
    changes: dict[str, dict[str, Any]] | None = None,
    facts: dict[str, dict[str, Any]] | None = None,
    encryption: str = "auto",
    hosts: dict[str, dict[str, Any]] | None = None,
    **more: Any,
) -> Measured:
    """Three good hosts. ``changes``: sections of ``check.sh`` by host; ``facts``: fields of its facts."""
    inventory = make_inventory(hosts=hosts, encryption=encryption)
    known = {
        n: make_facts(n, **{"engine": "29.10.0", "resolvers": ("192.0.2.53",), **(facts or {}).get(n, {})})
        for n in NAMES
    }
    refused: tuple[Refused, ...] = ()
    design = None
    try:
        design = bootstrap.design(inventory, Observed(known), {})
    except Refused as error:
        refused = (error,)
    chosen = design.encryption if design else encryption
    probes = {n: probe(n, **(changes or {}).get(n, {})) for n in NAMES}
    clocks = dict.fromkeys(NAMES, (0.0, 0.01))
    values: dict[str, Any] = {"probes": probes, "clocks": clocks, "refused": refused, "design": design, **more}
    return Measured(inventory, known, encryption=chosen, **values)


def bad(m: Measured) -> list[Finding]:
    return [f for f in (*check.quick(m), *check.hosts(m)) if f.level in (Level.WARNING, Level.ERROR)]


def only(found: list[Finding], what: str, where: str = "host2") -> Finding:
    assert [(f.where, f.what) for f in found] == [(where, what)], found
    assert found[0].why and found[0].mend
    return found[0]


def everything(m: Measured, **ends: dict[str, Any]) -> dict[str, End]:
    """Agents that saw all that was sent, with changes by host."""
    made = {}
    for b in NAMES:
        others = [a for a in NAMES if a != b]
        seen = {
            (kind, a, port): (address(int(a[-1])), address(int(a[-1])))
            for a in others
            for kind, port in [("udp", p) for p in check_pair.udp_ports(m, a, b)] + [("esp", 0)]
        }
        tcp = {str(port): "ok" for port in check_pair.tcp_ports(m)}
        made[b] = End(
            sent={a: {"tcp": tcp, "own": "", "error": ""} for a in others},
            seen=seen,
            largest=dict.fromkeys(others, 1500),
            transfers=dict.fromkeys(others, 0.05),
        )
    return {name: replace(end, **ends.get(name, {})) for name, end in made.items()}


# ---- hosts ----


@pytest.mark.parametrize("encryption", ["ipsec", "wireguard", "none"])
def test_good_hosts_are_good(encryption: str) -> None:
    m = measured(encryption=encryption, facts={n: {"engine": "29.10.0"} for n in NAMES})
    assert [f.what for f in bad(m)] == (["encryption"] if encryption == "none" else [])
    pairs = list(check_pair.judge(m, everything(m)))
    assert len(pairs) == 6 and {f.level for f in pairs} == {Level.OK}


CASES: list[tuple[str, dict[str, str], str, str]] = [
    ("live-restore", {"daemon_json": '{"live-restore": true}'}, "daemon configuration", "live-restore"),
    (
        "a flag of the unit",
        {"next": "/usr/sbin/dockerd --iptables=false -H fd://"},
        "daemon configuration",
        "flag of the unit",
    ),
    ("no JSON", {"daemon_json": "{,}"}, "daemon configuration", "no JSON object"),
    ("a list", {"daemon_json": "[]"}, "daemon configuration", "no JSON object"),
    ("nftables backend", {"daemon_json": '{"firewall-backend": "nftables"}'}, "daemon configuration", "nftables"),
    ("no masquerading", {"daemon_json": '{"ip-masq": false}'}, "daemon configuration", "ip-masq"),
    ("refused", {"validate": "unable: option: nope\nstatus=1"}, "daemon configuration", "unable"),
    ("disk", {"disk": f"{1 << 29} {100 << 30} 1000 2000 ext4 /"}, "disk", "0.5 GiB"),
    ("inodes", {"disk": f"{50 << 30} {100 << 30} 10 2000 ext4 /"}, "inodes", "10 of 2000"),
    ("NFS", {"disk": f"{50 << 30} {100 << 30} 0 0 nfs4 /srv"}, "disk", "nfs4"),
    ("memory", {"memory": "MemTotal=500000\nMemAvailable=100000"}, "memory", "98 of 488 MiB"),
    ("no time", {"time": ""}, "time synchronisation", "none"),
    ("snap", {"docker_path": "/snap/docker/1/bin/docker"}, "docker package", "snap"),
    ("podman", {"docker_path": "/usr/bin/podman"}, "docker package", "Podman"),
    ("rootless", {"info": '{"ID": "@", "SecurityOptions": ["name=rootless"]}'}, "docker package", "rootless"),
    ("vfs", {"info": '{"ID": "@", "Driver": "vfs"}'}, "storage driver", "vfs"),
    ("API", {"version": '{"ApiVersion": "1.40", "MinAPIVersion": "1.12"}'}, "engine API", "1.40"),
    ("no vxlan", {"kernel": GOOD["kernel"].replace("ok vxlan", "no vxlan: Unknown device type")}, "kernel", "VXLAN"),
    ("no python", {"python": ""}, "python3", "missing"),
    ("old python", {"python": "3.7"}, "python3", "3.7"),
    ("no tcpdump", {"programs": "/usr/bin/python3"}, "tcpdump", "missing"),
    ("at boot", {"units": "docker active disabled"}, "docker at boot", "disabled"),
    ("half an answer", {"end": "", "kernel": "ok vxlan"}, "", ""),
    (
        "upgrades",
        {"apt": 'unattended-upgrades=installed\nAPT::Periodic::Unattended-Upgrade "1";\ntimer=enabled'},
        "unattended upgrades",
        "docker.io",
    ),
    (
        "flush",
        {"nftables_conf": "", "nftables.conf": "3:flush ruleset", "units": "nftables active enabled"},
        "firewall",
        "flush",
    ),
    ("legacy", {"legacy": "-A INPUT -p tcp -j DROP"}, "iptables flavours", "1 rules"),
]


@pytest.mark.parametrize(("changes", "what", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_one_fault_is_one_finding(changes: dict[str, str], what: str, says: str) -> None:
    found = bad(measured({"host2": changes}))
    if not what:
        assert found == []
    else:
        assert says in only(found, what).measured


def test_what_is_held_or_black_listed_is_no_finding() -> None:
    on = 'unattended-upgrades=installed\nAPT::Periodic::Unattended-Upgrade "1";'
    assert bad(measured({"host2": {"apt": on, "held": "docker.io"}})) == []
    assert bad(measured({"host2": {"apt": on + '\nUnattended-Upgrade::Package-Blacklist:: "docker";'}})) == []
    assert bad(measured({"host2": {"apt": on + "\ntimer=masked"}})) == []


def test_an_answer_that_ends_early_is_named() -> None:
    m = measured()
    m = replace(
        m, probes={**m.probes, "host3": Probe("\n@@python\n3.13\n@@programs\n/usr/bin/tcpdump\n@@time\ndaemon=ntp\n")}
    )
    assert ("host3", "check") in [(f.where, f.what) for f in bad(m)]


def test_pools_of_docker_against_what_the_host_needs() -> None:
    route = json.dumps([{"dst": "default", "dev": "eth0"}, {"dst": "10.1.0.0/16", "dev": "eth1"}])
    lan = '{"default-address-pools": [{"base": "10.0.0.0/8", "size": 24}]}'
    assert (
        "10.1.0.0/16" in only(bad(measured({"host2": {"route": route, "daemon_json": lan}})), "address pools").measured
    )
    own = json.dumps([{"dst": "10.1.0.0/16", "dev": "br-1"}])
    assert bad(measured({"host2": {"route": own, "daemon_json": lan}})) == []
    cover = {"docker_nets": "bridge 172.17.0.0/16\nother 192.0.2.0/24"}
    assert only(bad(measured({"host2": cover})), "subnets").mend == "docker network rm other"


def test_the_quick_part_needs_facts_only() -> None:
    facts = {n: make_facts(n, engine="29.10.0", resolvers=("192.0.2.53",)) for n in NAMES}
    facts["host3"] = make_facts("host3", engine="29.10.0", resolvers=("192.0.2.53",), live_restore=True)
    found = cluster.quick(make_inventory(), Observed(facts))
    assert [(f.where, f.what) for f in found if f.level is Level.ERROR] == [("host3", "daemon configuration")]
    with_nat = make_inventory(hosts={"host3": {"nat": True}})
    unlucky = {**facts, "host3": make_facts("host3", tun=False, live_restore=False)}
    refused = [f for f in cluster.quick(with_nat, Observed(unlucky)) if f.level is Level.ERROR]
    assert [f.where for f in refused] == ["host3"] and "tun" in refused[0].measured


def test_kernel_by_back_end() -> None:
    missing = {
        "kernel": "\n".join(
            f"no {name}: refused" if name in ("policy", "bpf", "u32") else f"ok {name}" for name in KERNEL
        )
    }
    new = {n: {"engine": "29.10.0"} for n in NAMES}
    assert bad(measured({"host2": missing}, encryption="wireguard", facts=new)) == []
    found = bad(measured({"host2": missing}, encryption="ipsec", facts=new))
    assert {(f.where, f.what, f.level) for f in found} == {("host2", "kernel", Level.ERROR)} and len(found) == 2
    tunnel = {"kernel": GOOD["kernel"].replace("ok tun", "no tun: no").replace("ok wireguard", "no wireguard: no")}
    assert "neither" in only(bad(measured({"host2": tunnel}, encryption="wireguard")), "kernel").measured
    before = {"kernel": GOOD["kernel"].replace("ok nft", "no nft: sh: nft: not found")}
    assert bad(measured({"host2": before}, encryption="wireguard")) == []


@pytest.mark.parametrize(("ahead", "level"), [(1.5, None), (5, Level.WARNING), (-5, Level.WARNING), (100, Level.ERROR)])
def test_clocks(ahead: float, level: Level | None) -> None:
    m = measured(clocks={"host1": (50.0, 0.01), "host2": (50.0 + ahead, 0.01), "host3": (50.2, 0.01)})
    found = bad(m)
    assert [f.level for f in found] == ([level] if level else [])


def test_a_clock_that_is_read_slowly_is_not_blamed() -> None:
    assert bad(measured(clocks={"host1": (0.0, 0.01), "host2": (4.0, 3.0), "host3": (0.0, 0.01)})) == []


@pytest.mark.parametrize(
    ("one", "other", "wrong"), [(0.1, 7200.0, ["host2"]), (-7200.0, 0.1, ["host1"]), (60.0, 60.1, [])]
)
def test_of_two_clocks_the_operators_says_which_one_is_wrong(one: float, other: float, wrong: list[str]) -> None:
    """Two hosts alone would each be half of it off. Where both agree, it is the operator's that is."""
    found = bad(measured(clocks={"host1": (one, 0.01), "host2": (other, 0.01)}))
    assert [finding.where for finding in found if finding.what == "clock"] == wrong


def test_what_must_be_unique() -> None:
    same = {"machine_id": "x", "ssh_keys": "ssh-ed25519 x", "info": '{"ID": "x", "DockerRootDir": "/var/lib/docker"}'}
    found = bad(measured({"host1": same, "host3": same}, facts={"host3": {"hostname": "host1"}}))
    assert sorted(f.what for f in found) == ["SSH host key", "engine id", "host name", "machine-id"]
    assert {f.where for f in found} == {"host3"}


def test_addresses() -> None:
    elsewhere = {"host2": {"addresses": {"eth0": ("10.0.0.5",)}}}
    assert bad(measured(facts=elsewhere, encryption="wireguard")) == []
    found = bad(measured(facts=elsewhere, encryption="none"))
    found = [f for f in found if f.what != "encryption"]
    assert only(found, "address").mend.startswith("inventory: hosts.host2.advertise: 10.0.0.5")
    both = {"host2": {"addresses": {"eth0": (address(2),), "lo": ("127.0.0.1", address(3))}}}
    assert only(bad(measured(facts=both)), "address of another host").mend == f"ip addr del {address(3)}/32 dev lo"
    links = [{"ifname": "eth0", "addr_info": [{"local": address(2), "prefixlen": 24, "dynamic": True}]}]
    assert "DHCP" in only(bad(measured({"host2": {"links": json.dumps(links)}})), "address").measured


def test_hosts_that_do_not_answer_are_named_and_the_rest_is_looked_at() -> None:
    m = measured({"host3": {"daemon_json": "{"}})
    m = replace(m, facts={**m.facts, "host2": HostFacts("host2", unreachable="refused")})
    assert [(f.where, f.what) for f in bad(m)] == [("host2", "ssh"), ("host3", "daemon configuration")]


def test_ports_of_others() -> None:
    exim = 'tcp LISTEN 0 20 127.0.0.1:25 0.0.0.0:* users:(("exim4",pid=7,fd=3))'
    published = (Published("mta", (25,), "host2"),)
    found = bad(measured({"host2": {"sockets": exim}, "host3": {"sockets": exim}}, published=published))
    assert [(f.where, f.level, f.mend) for f in found] == [
        ("host2", Level.ERROR, "systemctl disable --now exim4"),
        ("host3", Level.WARNING, "systemctl disable --now exim4"),
    ]
    other = 'udp UNCONN 0 0 0.0.0.0:51820 0.0.0.0:* users:(("openvpn",pid=9,fd=3))'
    assert "openvpn" in only(bad(measured({"host2": {"sockets": other}}, encryption="wireguard")), "ports").measured
    inside = measured({"host2": {"sockets": other}}, encryption="wireguard", hosts={"host2": {"nat": True}})
    assert bad(inside) == []  # it calls from any port
    kernel = "udp UNCONN 0 0 0.0.0.0:51820 0.0.0.0:*\nudp UNCONN 0 0 0.0.0.0:4789 0.0.0.0:*"
    assert bad(measured({"host2": {"sockets": kernel}}, encryption="wireguard")) == []


# ---- engines ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20.10.23", {"CVE-2023-28840", "CVE-2023-28841", "CVE-2023-28842", "CVE-2026-92542", "CVE-2026-115538"}),
        ("20.10.24+dfsg1", {"CVE-2026-92542", "CVE-2026-115538"}),
        ("23.0.2", {"CVE-2023-28840", "CVE-2023-28841", "CVE-2023-28842", "CVE-2026-92542", "CVE-2026-115538"}),
        ("23.0.3", {"CVE-2026-92542", "CVE-2026-115538"}),
        ("25.0.19", {"CVE-2026-115538"}),
        ("28.2.2", {"CVE-2026-92542", "CVE-2026-115538", "moby#50129"}),
        ("29.1.0", {"CVE-2026-92542", "CVE-2026-115538", "moby#53141", "moby#51614"}),
        ("29.9.2", {"CVE-2026-115538"}),
        ("29.9.3", set()),
        ("29.10.0", set()),
        ("nonsense", set()),
    ],
)
def test_the_list_of_engines(text: str, expected: set[str]) -> None:
    assert {entry.advisory.split(" ")[0] for entry in engines.known_bad(text)} == expected


def test_a_bad_engine_matters_where_docker_encrypts() -> None:
    old = {n: {"engine": "20.10.23"} for n in NAMES}
    assert bad(measured(facts=old, encryption="wireguard")) == []
    found = [f for f in bad(measured(facts=old, encryption="ipsec")) if f.where == "host1"]
    assert sum(f.level is Level.ERROR for f in found) == 3 and sum(f.level is Level.WARNING for f in found) == 1
    assert all("apt-get changelog" in f.why for f in found if f.level is Level.ERROR)  # docker.io is Debian's
    dns = bad(measured(facts={n: {"engine": "28.2.2"} for n in NAMES}, encryption="wireguard"))
    assert [f.level for f in dns] == [Level.WARNING] * 3


def test_a_docker_that_was_started_without_ipsec_is_said() -> None:
    late: dict[str, Any] = {"host2": {"docker_esp": False, "esp": True}}
    [found] = bad(measured(facts=late, encryption="ipsec"))
    assert (found.where, found.level) == ("host2", Level.WARNING)
    assert "started when its kernel had none" in found.measured
    assert bad(measured(facts=late, encryption="wireguard")) == []
    late["host2"]["overlays"] = {"abcdefghij": 4097}
    assert bad(measured(facts=late, encryption="ipsec")) == []


def test_the_rule_of_the_advisory_makes_it_good() -> None:
    rule = {
        "rule": {
            "family": "ip",
            "table": "filter",
            "chain": "OUTPUT",
            "handle": 5,
            "expr": [
                {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": 4789}},
                {"xt": {"type": "match", "name": "owner"}},
                {"counter": {}},
                {"drop": None},
            ],
        }
    }
    m = measured({n: {"nft": json.dumps({"nftables": [rule]})} for n in NAMES}, encryption="ipsec")
    assert bad(m) == []


@pytest.mark.parametrize(
    ("text", "deletes"),
    [
        ("1.3.3\nnftables\n0", True),
        ("2.1.0\nnftables\n0", False),
        ("2.1.0\niptables\n0", True),
        ("2.1.0\nnftables\n3", True),
    ],
)
def test_firewalld_that_deletes_rules(text: str, deletes: bool) -> None:
    changes = {n: {"firewalld": text, "units": "docker active enabled\nfirewalld active enabled"} for n in NAMES}
    m = measured(changes, facts={n: {"engine": "29.9.0"} for n in NAMES}, encryption="ipsec")
    assert {f.what for f in bad(m)} == ({"engine version"} if deletes else set())


def test_mixed_engines() -> None:
    m = measured(facts={"host2": {"engine": "27.0.0"}, "host1": {"engine": "29.10.0"}, "host3": {"engine": "29.10.0"}})
    assert ("host2", "engine versions differ") in [(f.where, f.what) for f in bad(m)]


# ---- pairs ----


def drops(
    *rules: list[dict[str, Any]], policy: str = "accept", chain: str = "INPUT", hook: str = "input", family: str = "ip"
) -> str:
    place = {"family": family, "table": "filter", "chain": chain}
    top = {
        "family": family,
        "table": "filter",
        "name": chain,
        "type": "filter",
        "hook": hook,
        "prio": 0,
        "policy": policy,
    }
    listed = [{"rule": {**place, "handle": 7 + n, "expr": rule}} for n, rule in enumerate(rules)]
    return json.dumps({"nftables": [{"chain": top}, *listed]})


def rule(port: int, verdict: str = "drop", proto: str = "udp") -> list[dict[str, Any]]:
    left = {"payload": {"protocol": proto, "field": "dport"}}
    return [{"match": {"op": "==", "left": left, "right": port}}, {verdict: None}]


def lost(m: Measured, kind: str, port: int, a: str = "host1", b: str = "host2") -> list[Finding]:
    ends = everything(m)
    kept = {key: value for key, value in ends[b].seen.items() if key != (kind, a, port)}
    ends[b] = replace(ends[b], seen=kept)
    return [f for f in check_pair.judge(m, ends) if f.level is Level.ERROR]


def test_who_drops_is_named() -> None:
    found = lost(measured({"host2": {"nft": drops(rule(51820))}}, encryption="wireguard"), "udp", 51820)
    one = only(found, "UDP 51820", "host1 -> host2")
    assert one.on == "host2" and one.mend == f"iptables -I INPUT -s {address(1)} -p udp --dport 51820 -j ACCEPT"
    out = drops(rule(51820), chain="OUTPUT", hook="output")
    one = only(
        lost(measured({"host1": {"nft": out}}, encryption="wireguard"), "udp", 51820), "UDP 51820", "host1 -> host2"
    )
    assert one.on == "host1" and one.mend == f"iptables -I OUTPUT -d {address(2)} -p udp --dport 51820 -j ACCEPT"
    one = only(lost(measured(encryption="wireguard"), "udp", 51820), "UDP 51820", "host1 -> host2")
    assert one.on == "" and "no rule of the two hosts" in one.measured


def test_esp_is_not_a_port() -> None:
    m = measured(encryption="ipsec")
    one = only(lost(m, "esp", 0), "ESP", "host1 -> host2")
    assert "not a port" in one.measured
    esp = [
        {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "protocol"}}, "right": "esp"}},
        {"drop": None},
    ]
    one = only(lost(measured({"host2": {"nft": drops(esp)}}, encryption="ipsec"), "esp", 0), "ESP", "host1 -> host2")
    assert one.mend == f"iptables -I INPUT -s {address(1)} -p esp -j ACCEPT"


def test_the_mend_is_that_of_the_hosts_firewall() -> None:
    strict = drops(policy="drop", family="inet", chain="in")
    one = lost(measured({"host2": {"nft": strict}}, encryption="wireguard"), "udp", 51820)[0]
    assert one.mend == f"nft insert rule inet filter in ip saddr {address(1)} udp dport 51820 accept"
    ufw = {"nft": drops(policy="drop"), "ufw": "Status: active", "units": "ufw active enabled"}
    one = lost(measured({"host2": ufw}, encryption="wireguard"), "udp", 51820)[0]
    assert one.mend == f"ufw allow proto udp from {address(1)} to any port 51820"
    legacy = {"legacy": "-P INPUT ACCEPT\n-A INPUT -p udp -m udp --dport 51820 -j DROP"}
    one = lost(measured({"host2": legacy}, encryption="wireguard"), "udp", 51820)[0]
    assert one.mend == f"iptables-legacy -I INPUT -s {address(1)} -p udp --dport 51820 -j ACCEPT"


def test_what_is_dropped_inside_a_tunnel_that_is_not_there_yet() -> None:
    m = measured({"host2": {"nft": drops(rule(7946, "reject", "tcp"))}}, encryption="wireguard")
    found = [f for f in check_pair.judge(m, everything(m)) if f.level is Level.ERROR]
    assert only(found, "inside the tunnel").mend == "iptables -I INPUT -i swarmmail -j ACCEPT"


def test_a_small_path() -> None:
    m = measured(encryption="wireguard")
    ends = everything(m, host2={"largest": {"host1": 1380, "host3": 1500}})
    found = [f for f in check_pair.judge(m, ends) if f.level is Level.ERROR]
    assert only(found, "path MTU", "host1 -> host2").mend == "inventory: network.mtu: 1380"
    assert not check_pair.passes(m, "host2", "host1", ends) and check_pair.passes(m, "host2", "host3", ends)


@settings(deadline=None)
@given(st.integers(1280, 9216))
def test_every_mtu_is_found_to_within_a_step(mtu: int) -> None:
    tried = check_pair.sizes(9216)
    largest = max(size for size in tried if size <= mtu)
    assert mtu - largest < (4 if mtu <= 1500 else 101) and len(tried) < 150
    assert max(check_pair.sizes(mtu)) == mtu


@pytest.mark.parametrize("lost", [0, 1, 2], ids=["nothing", "the first time", "both times"])
def test_what_did_not_arrive_is_sent_once_more(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """A busy host reads late, or loses what comes in a burst. Seen: an error in a lab whose mail was just proven."""
    m = measured(encryption="wireguard")
    whole = everything(m)

    class Hosts:
        agents: dict[str, Any] = dict.fromkeys(NAMES)

        def __init__(self) -> None:
            self.ends = {name: replace(end, seen={}, largest={}) for name, end in whole.items()}
            self.asked: list[str] = []

        def ask(self, request: Callable[[str], dict[str, Any]], timeout: float = 10) -> dict[str, dict[str, Any]]:
            requests = {name: request(name) for name in NAMES}
            kind = requests["host1"].get("do", "begin")
            self.asked.append(kind)
            if kind == "begin":
                return {name: {"ports": {}} for name in NAMES}
            if kind == "send":
                return {name: {"sent": whole[name].sent} for name in NAMES}
            largest = {name: dict(end.largest) for name, end in whole.items()}
            if self.asked.count("report") <= lost:
                largest["host2"]["host1"] = 1380
            return {
                name: {"seen": [[*key, *sources] for key, sources in end.seen.items()], "largest": largest[name]}
                for name, end in whole.items()
            }

    hosts: Any = Hosts()
    monkeypatch.setattr(cluster, "_transfer", lambda *_: None)
    cluster._measure(hosts, m)
    assert hosts.asked == ["begin", "send", "report"] + ["send", "report"] * (lost > 0)
    errors = [found.what for found in check_pair.judge(m, hosts.ends) if found.level is Level.ERROR]
    assert errors == ["path MTU"] * (lost > 1)


def test_translation() -> None:
    for encryption, level in (("none", Level.ERROR), ("ipsec", Level.ERROR), ("wireguard", Level.WARNING)):
        m = measured(encryption=encryption, facts={n: {"engine": "29.10.0"} for n in NAMES})
        ends = everything(m)
        seen = {k: ("203.0.113.9", s[1]) if k[1] == "host3" else s for k, s in ends["host1"].seen.items()}
        ends["host1"] = replace(ends["host1"], seen=seen)
        found = [f for f in check_pair.judge(m, ends) if f.what == "NAT"]
        assert [(f.where, f.level) for f in found] == [("host3 -> host1", level)]
    m = measured(encryption="wireguard", hosts={"host3": {"nat": True}})
    assert check_pair.udp_ports(m, "host1", "host3") == []
    ends = everything(m)
    seen = {k: ("203.0.113.9", s[1]) if k[1] == "host3" else s for k, s in ends["host1"].seen.items()}
    ends["host1"] = replace(ends["host1"], seen=seen)
    assert {f.level for f in check_pair.judge(m, ends)} == {Level.OK, Level.NOTE}
    ends["host1"] = replace(ends["host1"], seen={k: s for k, s in seen.items() if k[1] != "host3"})
    found = [f for f in check_pair.judge(m, ends) if f.level is Level.ERROR]
    assert only(found, "UDP 51820", "host3 -> host1").mend.startswith("let UDP 51820 from the router of host3 to ")


def test_what_was_not_measured_is_never_ok() -> None:
    m = measured(encryption="wireguard")
    ends = everything(m, host3={"error": check_pair.NO_PYTHON})
    found = [f for f in check_pair.judge(m, ends) if "host3" in f.where]
    assert len(found) == 4 and all(f.level is Level.NOTE and "unknown" in f.measured for f in found)
    ends = everything(m, host3={"error": "its agent ended"})
    assert [f.where for f in check_pair.judge(m, ends) if f.level is Level.WARNING] == ["host3"]


def test_a_transfer_that_hangs() -> None:
    m = measured(encryption="wireguard")
    ends = everything(
        m, host1={"transfers": {"host2": "connected, but 60000 of 1048576 bytes went in 7 s", "host3": 0.1}}
    )
    found = [f for f in check_pair.judge(m, ends) if f.level is Level.ERROR]
    assert "60000" in only(found, "1 MB by a tunnel", "host1 -> host2").measured


@pytest.mark.parametrize(
    ("inside", "serves", "why", "mend"),
    [
        (False, 0, "WireGuard's do not", "another network.tunnel_port than 51820"),
        (False, 4000, "WireGuard's do not", "fab bootstrap"),
        (True, 0, "no answer comes back to host2 through its router", "let that router take answers"),
        (True, 4000, "it may hold a mapping that leads nowhere", "fab bootstrap: when nothing was heard for 180 s"),
    ],
)
def test_a_tunnel_that_does_not_answer(inside: bool, serves: int, why: str, mend: str) -> None:
    m = measured(encryption="wireguard", hosts={"host2": {"nat": True}} if inside else None)
    ends = everything(
        m,
        host1={"transfers": {"host2": f"{check_pair.NO_ANSWER} within 17 s", "host3": 0.1}},
        host2={"serves": serves},
    )
    found = only([f for f in check_pair.judge(m, ends) if f.level is Level.ERROR], "1 MB by a tunnel", "host1 -> host2")
    assert why in found.why and mend in found.mend


def test_a_transfer_whose_own_port_is_not_let_in_is_a_note() -> None:
    strict = drops(rule(4789, "accept"), policy="drop")
    for encryption, level in (("ipsec", Level.NOTE), ("none", Level.ERROR)):
        m = measured({"host2": {"nft": strict}}, encryption=encryption)
        ends = everything(m, host1={"transfers": {"host2": "no answer within 7 s", "host3": 0.1}})
        assert [f.level for f in check_pair.judge(m, ends) if f.what == "1 MB by a tunnel"] == [level]


# ---- mail ----


def mail(hostname: str = "mx.real.org", host: str = "host1") -> Measured:
    m = measured(published=(Published("mta", (25,), host),))
    spec = m.inventory.hosts[host].model_copy(update={"advertise": "203.0.114.7"})
    from swarmmail.model.inventory import Stack

    stack = Stack.model_construct(settings={"MAIL_HOSTNAME": hostname, "MAIL_DOMAIN": "real.org"}, placement={})
    inventory = m.inventory.model_copy(update={"hosts": {**m.inventory.hosts, host: spec}, "stack": stack})
    return replace(m, inventory=inventory)


def test_names_of_mail() -> None:
    good = check_mail.Answers(frozenset({"203.0.114.7"}), "mx.real.org", ("mx.real.org",))
    assert {f.level for f in check_mail.findings(mail(), good, {"host1": "220 hi"})} == {Level.OK}
    for wrong, what in (
        (replace(good, addresses=frozenset({"203.0.114.8"})), "mail names"),
        (replace(good, addresses=frozenset()), "mail names"),
        (replace(good, pointer="static-7.provider.net"), "reverse name"),
        (replace(good, mx=("mx.other.org",)), "MX"),
    ):
        assert [f.what for f in check_mail.findings(mail(), wrong, {}) if f.level is Level.WARNING] == [what]
    unasked = check_mail.findings(mail(), check_mail.Answers(), {"host1": "failed: timed out"})
    assert {f.level for f in unasked} == {Level.NOTE}
    assert check_mail.is_reserved("mx.lab.test") and not check_mail.is_reserved("mx.latest")


# ---- the outcome ----


def test_exit_status() -> None:
    note, warn, err = (
        findings.note("a", "b", "c"),
        findings.warning("a", "b", "c", "d", "e"),
        findings.error("a", "b", "c", "d", "e"),
    )
    assert findings.status([note]) == findings.status([note], strict=True) == 0
    assert findings.status([note, warn]) == 0 and findings.status([warn], strict=True) == 1
    assert findings.status([warn, err]) == findings.status([err], strict=True) == 2
    document = findings.document([note, warn, err])
    assert document["status"] == 2 and document["counts"] == {"ok": 0, "note": 1, "warning": 1, "error": 1}
    assert json.loads(json.dumps(document))["findings"][2]["on"] == "a"


words = st.sampled_from(
    [
        "[]",
        "{}",
        "null",
        "1",
        "-1",
        "[1]",
        '{"a": null}',
        "a=b",
        "a: b",
        "tcp LISTEN 0 0 x:1 y:2",
        "10.0.0.0/8",
        "\u00b2",
        "status=1",
    ]
)


@settings(deadline=None)
@given(st.text() | words | st.lists(words).map(" ".join) | st.lists(words).map("\n".join))
def test_no_answer_of_a_host_breaks_the_check(text: str) -> None:
    m = measured()
    odd = Probe("\n".join(f"@@{key}\n{text}" for key in GOOD))
    list(check.hosts(replace(m, probes={**m.probes, "host2": odd})))
    list(check_pair.judge(m, everything(m)))


def test_units_are_asked_for_all_at_once_and_read_one_by_one() -> None:
    """As systemd 257 prints it: an alias has its unit's main name, what is not there is inactive and nothing else."""
    script = (resources.files("swarmmail.cluster") / "check.sh").read_text()
    begin = script.index("units() {")
    printed = "\n".join(
        f"Id={unit}\nActiveState={active}\nUnitFileState={enabled}\n"
        for unit, active, enabled in (
            ("systemd-timesyncd.service", "inactive", ""),
            *[("chrony.service", "active", "enabled")] * 2,  # asked for as chrony and as chronyd
            ("docker.socket", "inactive", "disabled"),
        )
    )
    lines = [
        "s() { echo @@$1; }",
        f"systemctl() {{ echo '{printed}'; }}",
        script[begin : script.index("; }\n", begin) + 3],
        *(line for line in script.splitlines() if re.match("s (time|units);", line)),
    ]
    said = subprocess.run(["sh", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    probe = Probe(said)
    assert probe.values("time") == {"daemon": "chrony"}
    assert probe.units == {
        "systemd-timesyncd": ("inactive", ""),
        "chrony": ("active", "enabled"),
        "docker.socket": ("inactive", "disabled"),
    }
    assert probe.active("chrony") and not probe.active("docker.socket")


def test_an_election_is_waited_for_and_one_that_does_not_end_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A leader whose tunnel was down for 8 s: ``check`` came just then, and called a manager one of another swarm."""
    answers: list[Exception | None] = [work.Electing("no manager answers for the Swarm", host="host3")] * 2 + [None]
    gathered: list[str] = []

    def gather(fleet: object, strict: bool) -> dict[str, HostFacts]:
        gathered.append("led" if len(gathered) == 2 else "leaderless")
        return {"host1": make_facts("host1", cluster="c1" if gathered[-1] == "led" else "")}

    def look(fleet: object, facts: object) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(cluster, "gather_all", gather)
    monkeypatch.setattr(work, "look_at_swarm", look)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    problems: list[SwarmmailError] = []
    assert cluster._observe(None, problems).hosts["host1"].cluster == "c1"  # type: ignore[arg-type]
    assert (len(gathered), problems) == (3, [])
    assert capsys.readouterr().err.count(" s at most for them to elect one") == 1
    answers = [work.NoManager("without a majority", host="host3")]
    assert cluster._observe(None, problems).hosts["host1"].cluster == ""  # type: ignore[arg-type]
    assert [problem.what for problem in problems] == ["without a majority"]
