"""The inventory: what is refused and how it is said, what is filled in, and that the manual tells the truth."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from swarmmail.model import inventory, yamlfile
from swarmmail.model.errors import InputError

MANUAL = Path(__file__).parents[2] / "inventories" / "example.yml"

GOOD = """\
cluster: lab
ssh:
  key: ../.lab/id
hosts:
  host1:
    address: 10.1.0.11
    role: manager
  host2:
    address: 10.1.0.12
    role: worker
network:
  subnet: 10.91.0.0/24
stack:
  path: ../stacks/mail
  settings: {MAIL_DOMAIN: lab.test}
  placement: {mta: host1, mda: host2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with inventories/ in it: messages name files as the operator does."""
    (tmp_path / "inventories").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lab(folder: Path) -> Path:
    return Path("inventories/lab.yml")


def load(path: Path, text: str) -> inventory.Inventory:
    path.write_text(text)
    return inventory.load(path)


def refusal(path: Path, text: str | bytes) -> list[str]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        inventory.load(path)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def changed(*replacements: tuple[str, str]) -> str:
    text = GOOD
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


def hosts(*lines: str, network: str = "{}") -> str:
    """An inventory of one-line hosts; the first stands in line 3."""
    return "\n".join(["cluster: lab", "hosts:", *(f"  {line}" for line in lines), f"network: {network}", ""])


# ---- what is filled in ----


def test_defaults_are_merged_and_paths_start_at_the_file(lab: Path, folder: Path) -> None:
    loaded = load(lab, changed(("role: worker", "role: worker\n    port: 2222\n    key: ~/k")))
    first, second = loaded.hosts.values()
    assert (first.name, first.user, first.port, first.connect_timeout) == ("host1", "root", 22, 10)
    assert first.key == folder / ".lab/id"
    assert first.known_hosts == Path.home() / ".ssh/known_hosts"
    assert (second.port, second.key) == (2222, Path.home() / "k")
    assert first.advertise == "10.1.0.11"
    assert loaded.network.subnet == IPv4Network("10.91.0.0/24")
    assert loaded.stack and loaded.stack.path == folder / "stacks/mail"
    assert (loaded.lead.name, [h.name for h in loaded.workers]) == ("host1", ["host2"])
    assert loaded.notes() == []


def test_a_host_can_go_back_to_the_built_in_default(lab: Path) -> None:
    text = changed(("key: ../.lab/id", "port: 2222"), ("role: worker", "role: worker\n    port: 22"))
    assert [host.port for host in load(lab, text).hosts.values()] == [2222, 22]


def test_hosts_keep_the_order_of_the_file(lab: Path) -> None:
    loaded = load(lab, hosts("z: {address: 10.1.0.2, role: worker}", "10: {address: 10.1.0.1, role: manager}"))
    assert list(loaded.hosts) == ["z", "10"]
    assert loaded.lead.name == "10"


def test_a_key_without_a_value_counts_as_not_written(lab: Path) -> None:
    loaded = load(lab, changed(("key: ../.lab/id", "port:"), ("subnet: 10.91.0.0/24", "subnet:")))
    assert (loaded.lead.port, loaded.network.subnet) == (22, "auto")


def test_a_cluster_without_a_stack(lab: Path) -> None:
    assert load(lab, GOOD[: GOOD.index("stack:")]).stack is None


def test_yaml_1_2_no_and_off_are_text(lab: Path) -> None:
    loaded = load(lab, changed(("MAIL_DOMAIN: lab.test", "A: no, B: off, C: n, D: 1:30, E: 1_000, F: 2001-01-01")))
    assert loaded.stack
    assert list(loaded.stack.settings.values()) == ["no", "off", "n", "1:30", "1_000", "2001-01-01"]


def test_models_are_frozen(lab: Path) -> None:
    loaded = load(lab, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        loaded.lead.port = 23  # type: ignore[misc]


JUMPS = [
    ("host2", inventory.Jump(member="host2")),
    ("gate", inventory.Jump(address="gate", user="me", port=22)),
    ("op@gate.example.org:2022", inventory.Jump(address="gate.example.org", user="op", port=2022)),
    ("192.0.2.1", inventory.Jump(address="192.0.2.1", user="me", port=22)),
    ('"[2001:db8::1]:2022"', inventory.Jump(address="2001:db8::1", user="me", port=2022)),
]


@pytest.mark.parametrize(("text", "jump"), JUMPS)
def test_jump(lab: Path, text: str, jump: inventory.Jump) -> None:
    loaded = load(lab, changed(("role: manager", f"role: manager\n    user: me\n    jump: {text}")))
    assert loaded.lead.jump == jump


# ---- what is refused ----


def test_all_problems_at_once_in_the_order_of_the_lines(lab: Path) -> None:
    text = changed(
        ("cluster: lab", "cluster: Lab"),
        ("role: worker", "role: manger"),
        ("10.1.0.11", "10.1.0.311"),
        ("subnet: 10.91.0.0/24", "subnett: auto"),
        ("mta: host1", "mta: hots1"),
        ("{MAIL_DOMAIN: lab.test}", "{MAIL_PORT: 25, SWARMMAIL_X: x}"),
    )
    assert refusal(lab, text) == [
        "inventories/lab.yml:1: cluster: found 'Lab', allowed: a-z, 0-9 and -, a letter first, at most 32",
        "inventories/lab.yml:6: hosts.host1.address: found '10.1.0.311', allowed: a host name or an IP address; "
        "not a valid IP address",
        "inventories/lab.yml:10: hosts.host2.role: found 'manger', allowed: manager, worker; did you mean 'manager'?",
        "inventories/lab.yml:12: network.subnett: unknown key, allowed: name, subnet, encryption, mtu, "
        "tunnel_subnet, tunnel_port; did you mean 'subnet'?",
        "inventories/lab.yml:15: stack.settings.MAIL_PORT: found a number, allowed: text; put it in quotes",
        "inventories/lab.yml:15: stack.settings.SWARMMAIL_X: names that start with SWARMMAIL_ belong to the tool",
        "inventories/lab.yml:16: stack.placement.mta: found 'hots1', allowed: host1, host2; did you mean 'host1'?",
    ]


ONE_WRONG = [
    # old, new, line, key path, what the line must say
    ("role: worker", "", 8, "hosts.host2.role", "missing, allowed: manager, worker"),
    ("cluster: lab", "", 2, "cluster", "missing"),
    ("10.1.0.12", "", 9, "hosts.host2.address", "missing, allowed: a host name or an IP address"),
    ("10.1.0.12", "host_2.example.org", 8, "hosts.host2.advertise", "needed because address host_2.example.org is a"),
    ("10.1.0.12", "localhost:22", 9, "hosts.host2.address", "not a host name"),
    ("10.1.0.12", "10.1.2", 9, "hosts.host2.address", "not a valid IP address"),
    ("10.1.0.12", "10.12", 9, "hosts.host2.address", "put it in quotes"),
    ("10.1.0.12", "127.0.0.1", 8, "hosts.host2.advertise", "no address that other hosts can reach"),
    ("role: worker", "role: worker\n    advertise: x", 11, "hosts.host2.advertise", "addresses, not names"),
    ("role: worker", "role: worker\n    advertise: 224.0.0.1", 11, "hosts.host2.advertise", "cannot reach it"),
    ("role: worker", "role: worker\n    advertise: 0.0.0.0", 11, "hosts.host2.advertise", "cannot reach it"),
    ("role: worker", "role: worker\n    advertise: '::1'", 11, "hosts.host2.advertise", "cannot reach it"),
    ("role: worker", "role: worker\n    advertise: 10.1.0.11", 11, "hosts.host2.advertise", "host1 advertises already"),
    ("role: worker", "role: worker\n    advertise: 2001:db8::1", 11, "hosts.host2.advertise", "host1 advertises IPv4"),
    ("10.1.0.12", "10.1.0.11", 9, "hosts.host2.address", "the same SSH address and port as host1"),
    ("role: worker", "role: worker\n    jump: a b", 11, "hosts.host2.jump", "[user@]host[:port]"),
    ("role: worker", "role: worker\n    jump: me@gate:99999", 11, "hosts.host2.jump", "[user@]host[:port]"),
    ("role: worker", "role: worker\n    jump: host2", 11, "hosts.host2.jump", "circle: host2 -> host2"),
    ("role: worker", "role: worker\n    nat: yes", 11, "hosts.host2.nat", "write true or false, without quotes"),
    ("role: worker", "role: worker\n    name: x", 11, "hosts.host2.name", "unknown key"),
    ("role: manager", "role: worker", 4, "hosts", "no host has the role manager"),
    ("role: manager", "role: manager\n    nat: true", 8, "hosts.host1.nat", "first manager must be reachable"),
    ("key: ../.lab/id", 'port: "22"', 3, "ssh.port", "found '22', allowed: a port, 1 to 65535; write it without"),
    ("key: ../.lab/id", "port: 65536", 3, "ssh.port", "found 65536"),
    ("key: ../.lab/id", "port: true", 3, "ssh.port", "found true"),
    ("key: ../.lab/id", "port: 022.0", 3, "ssh.port", "found 22.0"),
    ("key: ../.lab/id", "key: ~nobody-of-that-name/id", 3, "ssh.key", "no such user"),
    ("key: ../.lab/id", 'key: "a\\nb"', 3, "ssh.key", "not a path"),
    ("key: ../.lab/id", "user: -oProxyCommand=x", 3, "ssh.user", "a login name"),
    ("key: ../.lab/id", "connect_timeout: 0", 3, "ssh.connect_timeout", "whole seconds"),
    ("subnet: 10.91.0.0/24", "subnet: 10.91.0.5/24", 12, "network.subnet", "did you mean '10.91.0.0/24'?"),
    ("subnet: 10.91.0.0/24", "subnet: 10.91.0.0/29", 12, "network.subnet", "too small"),
    ("subnet: 10.91.0.0/24", "subnet: 8.8.0.0/24", 12, "network.subnet", "addresses of the Internet"),
    ("subnet: 10.91.0.0/24", "subnet: fd00::/64", 12, "network.subnet", "needs IPv4 inside"),
    ("subnet: 10.91.0.0/24", "subnet: 10.91.0.0", 12, "network.subnet", "such as 10.91.0.0/24"),
    ("subnet: 10.91.0.0/24", "subnet: aut", 12, "network.subnet", "did you mean 'auto'?"),
    ("subnet: 10.91.0.0/24", "mtu: 1279", 12, "network.mtu", "1280 to 9000"),
    ("subnet: 10.91.0.0/24", "name: a.b", 12, "network.name", "letters, digits, - and _"),
    ("subnet: 10.91.0.0/24", "encryption: true", 12, "network.encryption", "found true, allowed: auto, ipsec"),
    ("subnet: 10.91.0.0/24", "encryption: no", 12, "network.encryption", "write auto for encryption"),
    ("subnet: 10.91.0.0/24", "encryption: wireguad", 12, "network.encryption", "did you mean 'wireguard'?"),
    ("  path: ../stacks/mail", "  name: mail", 13, "stack.path", "missing"),
    ("path: ../stacks/mail", "path: x\n  build: hst1", 15, "stack.build", "did you mean 'host1'?"),
    ("MAIL_DOMAIN: lab.test", "9A: x", 15, "stack.settings.9A", "not a name for a setting"),
    ("MAIL_DOMAIN: lab.test", "A: true", 15, "stack.settings.A", "found a boolean, allowed: text; put it in quotes"),
    ("MAIL_DOMAIN: lab.test", "A: [x]", 15, "stack.settings.A", "found a list, allowed: text"),
    ("{mta: host1, mda: host2}", "[host1]", 16, "stack.placement", "found a list, allowed: a mapping"),
    ("mta: host1", "mta: 1", 16, "stack.placement.mta", "found 1, allowed: text"),
]


@pytest.mark.parametrize(("old", "new", "line", "place", "says"), ONE_WRONG)
def test_one_mistake_gives_one_line(lab: Path, old: str, new: str, line: int, place: str, says: str) -> None:
    (problem,) = refusal(lab, changed((old, new)))
    assert problem.startswith(f"inventories/lab.yml:{line}: {place}: ")
    assert says in problem


@pytest.mark.parametrize("name", ["Host 2", "-host2", "local", "a" * 64])
def test_the_name_of_a_host(lab: Path, name: str) -> None:
    wrong, placement = refusal(lab, changed(("host2:\n", f"{name}:\n")))
    assert wrong.startswith("inventories/lab.yml:8: hosts.")
    assert placement.startswith("inventories/lab.yml:16: stack.placement.mda: found 'host2', allowed: host1, ")


def test_a_name_that_is_not_one_stays_on_its_line(lab: Path) -> None:
    wrong, placement = refusal(lab, changed(("host2:\n", '"a\\nb":\n')))
    assert wrong.startswith("inventories/lab.yml:8: hosts.'a\\nb': not a name")
    assert placement.endswith("found 'host2', allowed: host1, a\\nb; did you mean 'host1'?")


@pytest.mark.parametrize("key", ["subnet", "tunnel_subnet"])
def test_a_subnet_must_not_hold_the_hosts(lab: Path, key: str) -> None:
    assert refusal(lab, changed(("subnet: 10.91.0.0/24", f"{key}: 10.1.0.0/16"))) == [
        f"inventories/lab.yml:12: network.{key}: found '10.1.0.0/16', which holds {host}'s own address {address}"
        for host, address in (("host1", "10.1.0.11"), ("host2", "10.1.0.12"))
    ]


def test_nothing_follows_from_a_host_that_is_wrong_itself(lab: Path) -> None:
    assert len(refusal(lab, changed(("role: manager", "role: manger")))) == 1  # not: "no manager"


def test_the_same_address_by_another_way_is_another_host(lab: Path) -> None:
    loaded = load(
        lab,
        hosts(
            "a: {address: 192.168.0.2, advertise: 10.1.0.1, role: manager}",
            "b: {address: 192.168.0.2, advertise: 10.1.0.2, role: worker, jump: gate1}",
            "c: {address: 192.168.0.2, advertise: 10.1.0.3, role: worker, port: 2222}",
        ),
    )
    assert len(loaded.hosts) == 3


def test_the_same_address_written_differently(lab: Path) -> None:
    problems = refusal(
        lab,
        hosts(
            "a: {address: MX.example.org, advertise: '2001:db8::1', role: manager}",
            "b: {address: mx.example.org., advertise: '2001:DB8:0::1', role: worker, port: 22}",
        ),
    )
    assert [p.split(": ")[1] for p in problems] == ["hosts.b.address", "hosts.b.advertise"]


def test_jumps_in_a_circle_are_told_once(lab: Path) -> None:
    problems = refusal(
        lab,
        hosts(
            "a: {address: 10.1.0.1, role: manager, jump: b}",
            "b: {address: 10.1.0.2, role: worker, jump: c}",
            "c: {address: 10.1.0.3, role: worker, jump: b}",
        ),
    )
    assert problems == ["inventories/lab.yml:4: hosts.b.jump: the jumps go in a circle: b -> c -> b"]


@pytest.mark.parametrize(
    ("encryption", "says"),
    [("ipsec", "UDP checksums of the overlay (moby#37115)"), ("none", "cannot reach a host behind NAT")],
)
def test_nat_needs_the_tunnel(lab: Path, encryption: str, says: str) -> None:
    lines = "a: {address: 10.1.0.1, role: manager}", "b: {address: 10.1.0.2, role: worker, nat: true}"
    (problem,) = refusal(lab, hosts(*lines, network=f"{{encryption: {encryption}}}"))
    assert problem.startswith("inventories/lab.yml:4: hosts.b.nat: ")
    assert says in problem
    for possible in ("auto", "wireguard"):
        assert load(lab, hosts(*lines, network=f"{{encryption: {possible}}}")).hosts["b"].nat


def test_two_hosts_behind_nat_could_not_meet(lab: Path) -> None:
    (problem,) = refusal(
        lab,
        hosts(
            "a: {address: 10.1.0.1, role: manager}",
            "b: {address: 10.1.0.2, role: worker, nat: true}",
            "c: {address: 10.1.0.3, role: manager, nat: true}",
        ),
    )
    assert problem.startswith("inventories/lab.yml:5: hosts.c.nat: b is behind NAT too")


def test_subnets_that_collide_or_are_too_small(lab: Path) -> None:
    many = [f"h{i}: {{address: 10.1.0.{i}, role: manager}}" for i in range(1, 16)]
    problems = refusal(lab, hosts(*many, network="{subnet: 10.91.0.0/16, tunnel_subnet: 10.91.7.0/28}"))
    assert [p.split(": ", 1)[1] for p in problems] == [
        "network.subnet: found '10.91.0.0/16', which overlaps tunnel_subnet 10.91.7.0/28",
        "network.tunnel_subnet: found '10.91.7.0/28', room for 14 of 15 hosts",
    ]


def test_a_tunnel_subnet_may_be_full_and_the_ssh_address_counts_too(lab: Path) -> None:
    many = [f"h{i}: {{address: 10.1.0.{i}, role: manager}}" for i in range(1, 15)]
    assert len(load(lab, hosts(*many, network="{tunnel_subnet: 10.91.7.0/28}")).hosts) == 14
    one = "a: {address: 192.168.0.2, advertise: 10.1.0.1, role: manager}"
    (problem,) = refusal(lab, hosts(one, network="{subnet: 192.168.0.0/24}"))
    assert problem.endswith("which holds a's own address 192.168.0.2")


def test_an_ipv6_address_of_one_link_is_not_reachable_but_an_ipv4_one_may_be(lab: Path) -> None:
    (problem,) = refusal(lab, hosts("a: {address: mx, advertise: 'fe80::1', role: manager}"))
    assert problem.endswith("other hosts cannot reach it by that")
    assert load(lab, hosts("a: {address: 169.254.1.1, role: manager}")).lead.advertise == "169.254.1.1"


def test_values_of_settings_are_never_shown(lab: Path) -> None:
    secret = "271828182845"
    text = changed(("MAIL_DOMAIN: lab.test", f"PIN: {secret}, TOKENS: [{secret}]"))
    assert not any(secret in problem for problem in refusal(lab, text))


# ---- what is no inventory at all ----


NOT_YAML: list[tuple[str | bytes, str]] = [
    ("", ":1: the file is empty"),
    ("# nothing\n\n", ":1: the file is empty"),
    ("- a\n- b\n", ":1: found a list, allowed: a mapping with the keys cluster, ssh, hosts, network, stack"),
    ("lab\n", ":1: found 'lab', allowed: a mapping with the keys"),
    ("cluster: lab\nhosts: {a: [}\n", ":2: not YAML: column 13: while parsing a flow node"),
    ("cluster: lab\nhosts:\n\thost1: x\n", ":3: not YAML: column 1: a tab at the start of the line"),
    ("cluster: lab\n---\ncluster: b\n", ":2: not YAML: column 1: expected a single document"),
    ("cluster: lab\nhosts: *a\n", ":2: not YAML: column 8: found undefined alias 'a'"),
    ("cluster: lab\nssh: {}\ncluster: b\n", ":3: cluster: stands twice, first in line 1"),
    ("ssh:\n  port: 1\n  user: a\n  port: 2\n", ":4: ssh.port: stands twice, first in line 2"),
    ("cluster: lab\nhosts: &a\n  b: *a\n", ":2: hosts.b: contains itself"),
    ("cluster: !!python/name:os.system\n", ":1: cluster: has a YAML tag"),
    ("? [a]\n: b\n", ":1: has a key that is not a simple text"),
    ("a: \x00\n", ":1: not YAML: a control character"),
    (b"cluster: lab\nhosts: \xff\n", ":2: not UTF-8 text"),
    ("[" * 600, ":1: not usable: nested too deep"),
]


@pytest.mark.parametrize(("text", "says"), NOT_YAML)
def test_not_an_inventory(lab: Path, text: str | bytes, says: str) -> None:
    (problem,) = refusal(lab, text)
    assert problem.startswith(f"inventories/lab.yml{says}")


def test_no_such_file_and_a_folder(lab: Path) -> None:
    with pytest.raises(InputError, match=r"^inventories/lab.yml: no such file$"):
        inventory.load(lab)
    with pytest.raises(InputError, match=r"^inventories: cannot be read: Is a directory$"):
        inventory.load(Path("inventories"))


def test_nested_aliases_cost_nothing(lab: Path) -> None:
    lines = ["a0: &a0 {x: y}", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
    lines += ["cluster: *a39", "network: {mtu: *a39, subnet: *a39, encryption: *a39}"]
    assert "cluster: found a list" in " ".join(refusal(lab, "\n".join(lines)))


def test_lines_of_keys_in_lists(lab: Path) -> None:
    lab.write_text("a:\n  - b\n  - c:\n      d: 1\n")
    document = yamlfile.read(lab)
    places: list[tuple[str | int, ...]] = [(), ("a",), ("a", 0), ("a", 1, "c"), ("a", 1, "c", "d"), ("a", 2), ("x",)]
    assert [document.line(place) for place in places] == [1, 1, 2, 3, 4, 1, 1]
    assert document.problem(("a", 1), "text") == "inventories/lab.yml:3: a.1: text"


# ---- notes ----


@pytest.mark.parametrize(
    ("managers", "says"),
    [
        (1, None),
        (2, "2 managers survive the loss of none, no more than 1 would, because 2 of them must agree: make it 1 or 3"),
        (3, None),
        (4, "4 managers survive the loss of 1, no more than 3 would, because 3 of them must agree: make it 3 or 5"),
    ],
)
def test_an_even_number_of_managers_is_noted(lab: Path, managers: int, says: str | None) -> None:
    loaded = load(lab, hosts(*(f"h{i}: {{address: 10.1.0.{i}, role: manager}}" for i in range(1, managers + 1))))
    assert loaded.notes() == ([says] if says else [])


def test_no_encryption_is_shouted_about(lab: Path) -> None:
    (note,) = load(lab, changed(("subnet: 10.91.0.0/24", "encryption: none"))).notes()
    assert note.startswith("NO ENCRYPTION")


def test_a_jump_that_is_nearly_a_host_is_noted(lab: Path) -> None:
    (note,) = load(lab, changed(("role: worker", "role: worker\n    jump: hots1"))).notes()
    assert "did you mean 'host1'?" in note


# ---- files ----


def test_check_files(lab: Path, folder: Path) -> None:
    tls = "\n  tls: {certificate: tls.crt, key: tls.key}\n  address_hook: move-it"
    text = changed(("id\n", "id\n  known_hosts: known\n"), ("path: ../stacks/mail", f"path: ../stacks/mail{tls}"))
    loaded = load(lab, text.replace("role: worker", "role: worker\n    key: own"))
    at = folder / "inventories"
    assert inventory.check_files(loaded) == [
        f"inventories/lab.yml:3: ssh.key: {folder}/.lab/id: no such file",
        f"inventories/lab.yml:4: ssh.known_hosts: {at}/known: no such file",
        f"inventories/lab.yml:12: hosts.host2.key: {at}/own: no such file",
        f"inventories/lab.yml:16: stack.path: {folder}/stacks/mail/stack.yml: no such file",
        f"inventories/lab.yml:17: stack.tls.certificate: {at}/tls.crt: no such file",
        f"inventories/lab.yml:17: stack.tls.key: {at}/tls.key: no such file",
        f"inventories/lab.yml:18: stack.address_hook: {at}/move-it: no such file",
    ]
    for name in (".lab/id", "inventories/known", "inventories/own", "stacks/mail/stack.yml", "inventories/tls.crt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (at / "tls.key").mkdir()
    (at / "move-it").write_text("#!/bin/sh\n")
    assert inventory.check_files(loaded) == [
        f"inventories/lab.yml:17: stack.tls.key: {at}/tls.key: cannot be read",
        f"inventories/lab.yml:18: stack.address_hook: {at}/move-it: is not executable; chmod +x it",
    ]
    (at / "tls.key").rmdir()
    (at / "tls.key").touch()
    (at / "move-it").chmod(0o755)
    assert inventory.check_files(loaded) == []


def make(*names: str) -> None:
    for name in names:
        Path("inventories", name).touch()


def choose(explicit: str | None = None, environ: str | None = None, fabric: str | None = None) -> Path:
    return inventory.choose_inventory(explicit, {"SWARMMAIL_INVENTORY": environ} if environ else {}, fabric, Path())


def test_choice_in_the_order_of_precedence(folder: Path) -> None:
    make("example.yml", "a.yml", "b.yml", "c.yaml", "prod.eu.yml")
    (folder / "own.yml").touch()
    assert choose("a", "b", "prod.eu") == Path("inventories/a.yml")
    assert choose(None, "b", "a") == Path("inventories/b.yml")
    assert choose(None, None, "prod.eu") == Path("inventories/prod.eu.yml")
    assert choose("own.yml") == Path("own.yml")
    assert choose("c.yaml") == Path("inventories/c.yaml")
    assert choose(str(folder / "own.yml")) == folder / "own.yml"


def test_the_only_one_is_taken_and_the_manual_does_not_count(folder: Path) -> None:
    make("example.yml", "lab.yml", "README")
    assert choose() == Path("inventories/lab.yml")


@pytest.mark.parametrize(
    ("names", "arguments", "says"),
    [
        (
            ["a.yml", "lab.yml"],
            {},
            "which inventory? there are: a, lab; type --inventory a, or set SWARMMAIL_INVENTORY=a",
        ),
        (["example.yml"], {}, "no inventory: there is none in inventories/; copy inventories/example.yml and edit it"),
        (["lab.yml"], {"explicit": "lba"}, "--inventory: no inventory 'lba'; there are: lab; did you mean 'lab'?"),
        (["lab.yml"], {"explicit": ""}, "--inventory: no inventory ''"),
        (["lab.yml"], {"environ": "x/y.yml"}, "SWARMMAIL_INVENTORY: no inventory 'x/y.yml'; there are: lab"),
        ([], {"fabric": "lab"}, "swarmmail.inventory of fabric.yml: no inventory 'lab'; there is none in"),
    ],
)
def test_choice_that_fails_says_what_to_type(
    folder: Path, names: list[str], arguments: dict[str, str], says: str
) -> None:
    make(*names)
    with pytest.raises(InputError) as caught:
        choose(**arguments)
    assert caught.value.problems[0].startswith(says)


# ---- the manual ----


def written_keys(value: Any, schema: set[tuple[str, ...]], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Key paths of a document, as far as the schema names them; names that a user chooses as ``*``."""
    for key, item in value.items() if isinstance(value, dict) else ():
        free = any(path[: len(at) + 1] == (*at, "*") for path in schema)
        place = (*at, "*" if free else key)
        if not free and (at in schema and not any(path[:-1] == at for path in schema)):
            return  # the content of settings and placement is the user's
        yield from () if free else (place,)
        yield from written_keys(item, schema, place)


def comment_above(document: yamlfile.Document, place: tuple[str, ...]) -> dict[str, str]:
    """``allowed``, ``default``, ``required`` and ``optional`` of the comment above a key."""
    lines = document.path.read_text().splitlines()[: document.line(place) - 1]
    said: dict[str, str] = {}
    while lines and lines[-1].lstrip().startswith("#"):
        words = re.match(r"# (allowed|default|required|optional)(?:: (.*))?$", lines.pop().strip())
        if words:
            said[words[1]] = words[2] or ""
    return said


def test_the_manual_loads() -> None:
    loaded = inventory.load(MANUAL)
    assert loaded.notes() == []
    assert loaded.stack


def test_manual_and_schema_have_the_same_keys() -> None:
    schema = {path for path, _ in yamlfile.keys(inventory.File)}
    assert ("hosts", "*", "jump") in schema
    assert ("stack", "tls", "ca") in schema
    assert set(written_keys(yamlfile.read(MANUAL).value, schema)) == schema


@pytest.mark.parametrize("path", [path for path, _ in yamlfile.keys(inventory.File)], ids=".".join)
def test_the_manual_says_what_the_schema_says(path: tuple[str, ...]) -> None:
    document = yamlfile.read(MANUAL)
    info = dict(yamlfile.keys(inventory.File))[path]
    names = [name for name, host in document.value["hosts"].items() if path[-1] in host]
    place = tuple(names[0] if step == "*" else step for step in path)
    said = comment_above(document, place)
    has_section = any(len(other) == len(path) + 1 and other[:-1] == path for other, _ in yamlfile.keys(inventory.File))
    if has_section:
        expected: dict[str, Any] = {"required" if info.is_required() else "optional": ""}
    else:
        expected = {"allowed": info.description}
        if path[0] == "hosts" and path[-1] in inventory.Ssh.model_fields:
            expected["default"] = f"ssh.{path[-1]}"
        elif info.is_required():
            expected["required"] = ""
        else:
            default = info.get_default()
            text = str(default) if isinstance(default, Path) else default
            expected["default"] = "nothing" if default is None else text
            if "default" in said and default is not None:
                said["default"] = YAML(typ="safe", pure=True).load(said["default"])
    assert said == expected


# ---- anything else ----


NAMES = sorted({path[-1] for path, _ in yamlfile.keys(inventory.File)} | {"host1", "host2", "mta", "[key]", "a\nb", ""})
WORDS = ["auto", "none", "manager", "worker", "10.1.0.1", "10.1.0.1/24", "::1", "host1", "local", "~x/y", "a@b:1", "\0"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)


def places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield (*at, key)
        yield from places(item, (*at, key))


@st.composite
def nearly_right(draw: st.DrawFn) -> Any:
    """The manual or the good example, with up to three of its keys replaced, removed or added to."""
    value = copy.deepcopy(draw(st.sampled_from([yamlfile.read(MANUAL).value, YAML(typ="safe", pure=True).load(GOOD)])))
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(value))
        if not found:
            break
        *above, last = draw(st.sampled_from(found))
        holder = value
        for step in above:
            holder = holder[step]
        action = draw(st.sampled_from(["replace", "remove", "remove", "add"]))
        if action == "remove":
            del holder[last]
        else:
            holder[last if action == "replace" else draw(st.sampled_from(NAMES))] = draw(anything)
    return value


def loads_or_says_why(path: Path) -> None:
    try:
        loaded = inventory.load(path)
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert re.fullmatch(rf"{re.escape(str(path))}:\d+: [^\n]+", problem), problem
    else:
        assert loaded.lead.advertise
        loaded.notes()
        inventory.check_files(loaded)


fuzzed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@given(nearly_right())
@fuzzed
def test_a_changed_inventory_loads_or_says_why(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "fuzz.yml"
    with path.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(value, stream)
    loads_or_says_why(path)


@given(anything)
@fuzzed
def test_any_document_loads_or_says_why(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "fuzz.yml"
    with path.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(value, stream)
    loads_or_says_why(path)


@given(st.binary(max_size=60) | st.text(alphabet="abc:-?[]{}&*!|>'\"%@`,# \n\t~01.\\", max_size=60).map(str.encode))
@fuzzed
def test_any_bytes_load_or_say_why(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzz.yml"
    path.write_bytes(raw)
    loads_or_says_why(path)
