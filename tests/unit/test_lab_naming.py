from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from swarmmail.lab.naming import MAX_BARE, MAX_HOSTS, Naming, Subnets, addresses, planned, routes

ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def test_two_folders_share_no_name(tmp_path: Path) -> None:
    one, two = Naming.of(tmp_path / "one"), Naming.of(tmp_path / "two")
    assert one.network != two.network
    assert one.bridge != two.bridge
    assert one.container("host1") != two.container("host1")
    assert one.volume("host1") != two.volume("host1")


def test_the_same_folder_by_another_path_is_the_same_lab(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert Naming.of(tmp_path / "link") == Naming.of(tmp_path / "one" / ".." / "one")


@settings(deadline=None)
@given(st.text("0123456789abcdef", min_size=8, max_size=8))
def test_bridge_name_fits_into_a_device_name(id: str) -> None:
    assert len(Naming(id).bridge) <= 15
    assert len(Naming(id).inner_bridge) <= 15
    assert Naming(id).inner_bridge != Naming(id).bridge


@settings(deadline=None)
@given(st.text("0123456789abcdef", min_size=8, max_size=8), st.integers(0, 511))
def test_a_taken_subnet_is_passed_over(id: str, steps: int) -> None:
    naming = Naming(id)
    first = list(islice(naming.subnets([]), steps + 1))
    assert next(naming.subnets(first[:steps])) == first[steps]


def test_a_route_to_the_whole_range_leaves_none() -> None:
    assert not list(Naming("00000000").subnets([IPv4Network("198.18.0.0/15")]))


def test_every_subnet_is_offered_once() -> None:
    offered = list(Naming("ffffffff").subnets([]))
    assert len(offered) == len(set(offered)) == 512


def test_a_host_keeps_its_number_when_others_come() -> None:
    three, five = planned(3), planned(5, bare=2)
    assert five[:3] == three
    assert [host.name for host in five] == ["host1", "host2", "host3", "host4", "host5", "bare1", "bare2"]
    assert [host.variant for host in five[4:]] == ["host", "bare", "bare"]


def test_addresses_are_distinct_and_inside() -> None:
    subnet = IPv4Network("198.18.7.0/24")
    found = addresses(Subnets(subnet))
    assert len(set(found)) == MAX_HOSTS + MAX_BARE
    assert found[0] == "198.18.7.11"
    assert all(address in map(str, subnet.hosts()) for address in found)


def test_one_host_is_behind_the_router_and_the_router_is_nobody_else() -> None:
    outer, inner = IPv4Network("198.18.7.0/24"), IPv4Network("198.18.6.0/24")
    subnets = Subnets(outer, inner)
    found = {host.name: subnets.address(host) for host in planned(MAX_HOSTS, MAX_BARE)}
    assert [name for name, address in found.items() if IPv4Address(address) in inner] == ["host3"]
    assert found["host3"] == "198.18.6.13"
    assert (subnets.router, subnets.gateway) == ("198.18.7.254", "198.18.6.254")
    assert not {subnets.router, subnets.gateway} & set(found.values())
    assert (subnets.topology, Subnets(outer).topology, Subnets(outer).gateway) == ("nat", "flat", "")


def test_routes_are_read_from_the_kernels_table() -> None:
    assert routes(ROUTES) == [("eth0", IPv4Network("0.0.0.0/0")), ("docker0", IPv4Network("172.17.0.0/16"))]
