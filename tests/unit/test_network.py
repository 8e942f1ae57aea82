"""``model.network`` and the choice of subnets in ``model.bootstrap``."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

import pytest
from builders import make_facts, make_inventory
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmmail.model import bootstrap
from swarmmail.model import network as net
from swarmmail.model.errors import Refused
from swarmmail.model.facts import Mesh

TUNNEL = Mesh(config="[Interface]\nAddress = 10.90.0.1/24\n")


def net4(*texts: str) -> tuple[IPv4Network, ...]:
    return tuple(IPv4Network(text) for text in texts)


# ---- which addresses are free ----


def test_the_first_block() -> None:
    block = net.free_block([])
    assert (str(block.tunnel), str(block.overlay), str(block.pool)) == (
        "10.90.0.0/24",
        "10.90.1.0/24",
        "10.90.128.0/17",
    )


PRIVATE = st.builds(
    lambda ip, bits: IPv4Network((ip, bits), strict=False),
    st.integers(int(IPv4Network("10.0.0.0/8")[0]), int(IPv4Network("10.0.0.0/8")[-1]))
    | st.integers(int(IPv4Network("172.16.0.0/12")[0]), int(IPv4Network("172.16.0.0/12")[-1])),
    st.integers(9, 32),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PRIVATE, max_size=30))
def test_a_free_block_collides_with_nothing(used: list[IPv4Network]) -> None:
    try:
        block = net.free_block(used)
    except Refused:
        candidates = [f"10.{i}.0.0/16" for i in range(255)] + [f"172.{i}.0.0/16" for i in range(16, 32)]
        assert all(any(IPv4Network(text).overlaps(one) for one in used) for text in candidates)
        return
    parts = [block.tunnel, block.overlay, block.pool]
    assert not any(part.overlaps(one) for part in parts for one in used)
    assert not any(a.overlaps(b) for i, a in enumerate(parts) for b in parts[i + 1 :])


def test_no_block_is_free() -> None:
    with pytest.raises(Refused, match=r"set network\.subnet and network\.tunnel_subnet"):
        net.free_block(list(net4("10.0.0.0/8", "172.16.0.0/12")))


def test_what_counts_as_taken() -> None:
    facts = make_facts(
        "host1",
        routes=net4("192.168.7.0/24"),
        resolvers=("10.255.255.53", "fd00::53", "fe80::1%eth0"),
        addresses={"eth0": ("10.4.4.4", "2001:db8::1"), "eth1": ()},
    )
    found = net.taken([facts], make_inventory("mm"))
    assert set(found) == set(
        net4("192.168.7.0/24", "10.255.255.53/32", "10.4.4.4/32", "198.18.0.11/32", "198.18.0.12/32")
    )


def decided(network: dict[str, Any], **changes: Any) -> bootstrap.Design:
    inventory = make_inventory("m", **network)
    return bootstrap.design(inventory, bootstrap.Observed({"host1": make_facts("host1", **changes)}), {})


def subnets(network: dict[str, Any], **changes: Any) -> tuple[str, str]:
    """Of the tunnel and of the overlay."""
    design = decided({"encryption": "wireguard", **network}, **changes)
    assert design.mesh is not None
    assert not design.mesh.subnet.overlaps(IPv4Network(design.overlay_subnet))
    assert not design.block.pool.overlaps(design.mesh.subnet)
    assert not design.block.pool.overlaps(IPv4Network(design.overlay_subnet))
    return str(design.mesh.subnet), design.overlay_subnet


def test_a_subnet_that_was_asked_for_is_not_given_to_anything_else() -> None:
    assert subnets({}) == ("10.90.0.0/24", "10.90.1.0/24")
    assert subnets({"subnet": "10.90.0.0/24"}) == ("10.91.0.0/24", "10.90.0.0/24")
    assert subnets({"tunnel_subnet": "10.90.1.0/24"}) == ("10.90.1.0/24", "10.91.1.0/24")


def test_the_own_tunnel_is_nobody_elses_network() -> None:
    """After a run that was killed the same block is found again."""
    routes = net4("10.90.0.0/24")
    addresses = {"eth0": ("198.18.0.11",), "swarmmail": ("10.90.0.1",)}
    assert subnets({}, mesh=TUNNEL, routes=routes, addresses=addresses) == ("10.90.0.0/24", "10.90.1.0/24")
    assert subnets({}, routes=routes) == ("10.91.0.0/24", "10.91.1.0/24")
    asked = {"tunnel_subnet": "10.90.0.0/24"}
    assert subnets(asked, mesh=TUNNEL, routes=routes, addresses=addresses)[0] == "10.90.0.0/24"


@pytest.mark.parametrize("key", ["subnet", "tunnel_subnet"])
def test_a_subnet_that_a_host_uses_is_refused(key: str) -> None:
    with pytest.raises(
        Refused, match=rf"host1, choose subnets: network\.{key} 10\.77\.0\.0/24 overlaps 10\.77\.0\.0/16"
    ):
        subnets({key: "10.77.0.0/24"}, routes=net4("10.77.0.0/16"))


def test_a_tunnel_subnet_matters_only_where_there_is_a_tunnel() -> None:
    assert decided({"encryption": "ipsec", "tunnel_subnet": "10.77.0.0/24"}, routes=net4("10.77.0.0/16")).mesh is None


# ---- sizes ----


@pytest.mark.parametrize(
    ("mtus", "links", "asked", "expected"),
    [
        ((1500, 1400), ("eth0", "eth0"), "auto", 1400),
        ((9000, 9000), ("eth0", "eth0"), "auto", 9000),
        ((9000, 1400), ("eth0", "eth0"), 1300, 1300),
        ((9000, 9000), ("eth0", None), "auto", 1500),  # behind NAT nobody knows what lies between
        ((1400, 9000), ("eth0", None), "auto", 1400),
    ],
)
def test_the_mtu_of_the_underlay(mtus: Any, links: Any, asked: Any, expected: int) -> None:
    inventory = make_inventory("mm", mtu=asked)
    hosts = {
        name: make_facts(
            name,
            mtus={"eth0": mtu, "docker0": 1200},
            addresses={"docker0": ("172.17.0.1",), "eth0": (inventory.hosts[name].advertise if link else "10.0.0.5",)},
        )
        for name, mtu, link in zip(inventory.hosts, mtus, links, strict=True)
    }
    assert net.underlay_mtu(hosts, inventory) == expected


def test_the_mtu_option_of_the_overlay_means_what_carries_it() -> None:
    assert decided({"encryption": "ipsec"}).network_mtu == 1500
    assert decided({"encryption": "wireguard"}).network_mtu == 1420


# ---- how to encrypt ----


ESP, NO_ESP = {"esp": True}, {"esp": False}


@pytest.mark.parametrize(
    ("asked", "facts", "nat", "overlay", "expected", "why"),
    [
        ("auto", (ESP, ESP), False, None, "ipsec", "every kernel accepts"),
        ("auto", (ESP, NO_ESP), False, None, "wireguard", "no ESP with AES-GCM in the kernel of host2"),
        ("auto", (NO_ESP, NO_ESP), False, None, "wireguard", "kernel of host1, host2"),
        ("auto", (ESP, ESP), True, None, "wireguard", "host2 behind NAT"),
        ("auto", (ESP, NO_ESP), True, None, "wireguard", "kernel of host2, host2 behind NAT"),
        ("auto", (ESP, {"esp": True, "mesh": TUNNEL}), False, None, "wireguard", "the tunnel is there already"),
        ("auto", (ESP, {"esp": True, "mesh": TUNNEL}), False, False, "wireguard", "the tunnel is there already"),
        ("auto", (ESP, {"esp": False, "mesh": TUNNEL}), False, True, "ipsec", "the overlay is there already"),
        ("auto", (NO_ESP, NO_ESP), False, True, "ipsec", "the overlay is there already"),
        ("ipsec", (ESP, ESP), False, None, "ipsec", "the inventory says so"),
        ("wireguard", (ESP, ESP), True, None, "wireguard", "the inventory says so"),
        ("none", (ESP, ESP), False, None, "none", "CLEAR TEXT"),
    ],
)
def test_the_choice(asked: str, facts: Any, nat: bool, overlay: bool | None, expected: str, why: str) -> None:
    inventory = make_inventory("mw", encryption=asked, hosts={"host2": {"nat": True}} if nat else {})
    hosts = {f"host{i}": make_facts(f"host{i}", **changes) for i, changes in enumerate(facts, 1)}
    chosen, reason = net.choose_encryption(inventory, hosts, overlay)
    assert chosen == expected
    assert why in reason


@pytest.mark.parametrize("asked", ["auto", "wireguard"])
@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({"tun": False, "wireguard_kernel": False}, False),
        ({"tun": True, "wireguard_kernel": False}, True),
        ({"tun": False, "wireguard_kernel": True}, True),
    ],
)
def test_a_tunnel_needs_wireguard_or_tun(asked: str, changes: dict[str, bool], possible: bool) -> None:
    inventory = make_inventory("mm", encryption=asked)
    hosts = {"host1": make_facts("host1", esp=False), "host2": make_facts("host2", esp=False, **changes)}
    if possible:
        assert net.choose_encryption(inventory, hosts, None)[0] == "wireguard"
    else:
        with pytest.raises(Refused, match=r"host2.*neither WireGuard in the kernel nor /dev/net/tun"):
            net.choose_encryption(inventory, hosts, None)


TRANSLATED = {"eth0": ("192.168.1.5",)}
"""The links of a host that its own advertised address is not on."""


def test_an_address_that_is_not_the_hosts_own_is_nat_whether_declared_or_not() -> None:
    hosts = {"host1": make_facts("host1"), "host2": make_facts("host2", addresses=TRANSLATED)}
    assert net.choose_encryption(make_inventory("mm"), hosts, None) == ("wireguard", "host2 behind NAT")
    with pytest.raises(Refused, match=r"host2, network\.encryption: ipsec: is behind address translation.*wireguard"):
        net.choose_encryption(make_inventory("mm", encryption="ipsec"), hosts, None)


@pytest.mark.parametrize("asked", ["auto", "ipsec"])
def test_an_encrypted_overlay_that_is_there_is_kept_behind_nat_too(asked: str) -> None:
    """Whether it passes anything is for ``verify`` to say: a plan does not take it away."""
    hosts = {"host1": make_facts("host1"), "host2": make_facts("host2", addresses=TRANSLATED)}
    assert net.choose_encryption(make_inventory("mm", encryption=asked), hosts, True)[0] == "ipsec"


def test_a_host_that_told_nothing_is_not_taken_for_one_behind_nat() -> None:
    hosts = {"host1": make_facts("host1"), "host2": make_facts("host2", addresses={})}
    assert net.choose_encryption(make_inventory("mm"), hosts, None)[0] == "ipsec"


def test_ipsec_that_could_pass_nothing_is_refused() -> None:
    hosts = {"host1": make_facts("host1"), "host2": make_facts("host2", esp=False)}
    with pytest.raises(Refused, match=r"host2.*does not accept an ESP state.*load esp4 and gcm"):
        net.choose_encryption(make_inventory("mm", encryption="ipsec"), hosts, None)
