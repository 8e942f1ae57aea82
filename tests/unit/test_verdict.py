"""The verdict on a pair: what it takes to be proven, and the name of what is missing."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmmail.wire import state, verdict
from swarmmail.wire.judge import Count, Packet, Seen
from swarmmail.wire.state import Peer, State
from swarmmail.wire.verdict import End, Evidence, Forgery

MTA = End("host1", "mta", "10.90.1.3", "02:42:0a:5a:01:03", 100, "10.90.0.1")
MDA = End("host3", "mda", "10.90.1.2", "02:42:0a:5a:01:02", 200, "10.90.0.3")
LEAK = Packet(time=1.0, interface=2, source="198.18.0.11", target="198.18.0.13", what="UDP 4789 VXLAN VNI 4097")
SEEN = Seen(
    packets=100,
    truncated=False,
    marker=(),
    marker_count=0,
    control=2,
    clear=(),
    clear_count=0,
    other_vxlan=0,
    out=Count(20, 4000),
    back=Count(20, 4000),
    handshakes=1,
    esp_out={},
    esp_back={},
)


def host(own: End, other: End, key: str, other_key: str) -> State:
    return State(
        directory="/run/swarmmail-verify.x",
        ready="yes",
        tunnel=own.data_path,
        key=key,
        port=51820,
        peers={other_key: Peer(other.data_path, ("198.18.0.99", 51820), 20.0)},
        blackholes=(IPv4Network("10.90.0.0/24"),),
        guards_in=True,
        guards_out=True,
        forwarding={other.mac: other.data_path},
        mtus={own.process: {own.address: 1370}},
    )


GOOD = Evidence(
    sender=MTA,
    receiver=MDA,
    backend="wireguard",
    vni=4097,
    arrived=True,
    at_sender=SEEN,
    at_receiver=SEEN,
    states={"host1": host(MTA, MDA, "one", "three"), "host3": host(MDA, MTA, "three", "one")},
    forgeries=(Forgery("as a stranger", reached=True, delivered=False),),
    mtu=1370,
    letter="250 2.0.0 Saved",
)


def at(where: str, **changes: Any) -> Evidence:
    return replace(GOOD, states={**GOOD.states, where: replace(GOOD.states[where], **changes)})


def names(evidence: Evidence) -> list[str]:
    return [cause.name for cause in verdict.judge(evidence).causes]


def test_all_seen_is_proven() -> None:
    found = verdict.judge(GOOD)
    assert (found.outcome, found.causes) == ("proven", ())
    assert found.pair == "mta@host1 -> mda@host3"
    assert any("WireGuard 20 out 20 back" in line for line in found.evidence)
    assert any("1 reached host3, 0 delivered" in line for line in found.evidence)


BROKEN = {
    "clear-text": replace(GOOD, at_receiver=replace(SEEN, marker=(LEAK,), marker_count=1)),
    "clear-vxlan": replace(GOOD, at_sender=replace(SEEN, clear=(LEAK,), clear_count=3)),
    "forged": replace(GOOD, forgeries=(Forgery("as a stranger", True, False), Forgery("as a peer", True, True))),
    "black-hole": replace(GOOD, arrived=False, trouble="timed out", forgeries=()),
    "guard-missing": at("host3", guards_in=False),
    "blackhole-missing": at("host1", blackholes=()),
    "tunnel-down": at("host3", tunnel=""),
    "peer-missing": at("host1", peers={}),
    "wrong-key": at("host1", peers={"two": Peer("10.90.0.3", None, 5.0)}),
    "data-path": at("host1", forwarding={MDA.mac: "198.18.0.13"}),
    "mtu": at("host3", mtus={200: {"10.90.1.2": 1450}}),
    "large-mail": replace(GOOD, letter="timed out at the connection"),
    "encryption-none": replace(GOOD, backend="none"),
    "no-handshake": replace(
        at("host1", peers={"three": Peer("10.90.0.3", None, None)}), arrived=False, trouble="timed out"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_leak_is_broken_by_its_name(name: str) -> None:
    found = verdict.judge(BROKEN[name])
    assert found.outcome == "broken"
    also = [] if BROKEN[name].arrived or name == "black-hole" else ["black-hole"]
    assert [cause.name for cause in found.causes if cause.outcome == "broken"] == [name, *also]
    assert found.causes[0].mend and found.causes[0].text


UNKNOWN = {
    "no-capture": replace(GOOD, at_sender=None),
    "capture-cut": replace(GOOD, at_receiver=replace(SEEN, truncated=True)),
    "no-control": replace(GOOD, at_receiver=replace(SEEN, control=0)),
    "capture-dropped": replace(GOOD, dropped=3),
    "no-cipher": replace(GOOD, at_sender=replace(SEEN, out=Count(0, 0))),
    "no-forgery": replace(GOOD, forgeries=()),
    "not-measured": replace(GOOD, failed=("host1: no raw socket",)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_without_a_working_measurement_it_is_unknown(name: str) -> None:
    found = verdict.judge(UNKNOWN[name])
    assert found.outcome == "unknown"
    assert [cause.name for cause in found.causes] == [name]


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "not-measured"), ({"failed": ("host1: no agent",)}, "not-measured"), ({"at_receiver": None}, "no-capture")],
)
def test_an_arrival_that_was_not_measured_is_no_black_hole(changes: dict[str, Any], name: str) -> None:
    found = verdict.judge(replace(GOOD, arrived=None, **changes))
    assert (found.outcome, [cause.name for cause in found.causes]) == ("unknown", [name])


def test_a_silenced_capture_proves_nothing() -> None:
    silent = replace(SEEN, packets=0, control=0, out=Count(0, 0), back=Count(0, 0))
    assert verdict.judge(replace(GOOD, at_sender=silent, at_receiver=silent)).outcome == "unknown"


def test_a_leak_outweighs_a_failed_measurement_and_stands_first() -> None:
    both = replace(GOOD, dropped=3, at_sender=None, at_receiver=replace(SEEN, marker=(LEAK,), marker_count=1))
    found = verdict.judge(both)
    assert (found.outcome, found.causes[0].name) == ("broken", "clear-text")


def test_on_one_host_nothing_leaves_and_nothing_need_be_encrypted() -> None:
    neighbour = replace(MDA, host="host1", data_path="10.90.0.1")
    quiet = replace(SEEN, out=Count(0, 0), back=Count(0, 0))
    states = {"host1": replace(GOOD.states["host1"], mtus={100: {"10.90.1.3": 1370}})}
    one = replace(GOOD, receiver=neighbour, at_sender=quiet, at_receiver=quiet, states=states, forgeries=())
    found = verdict.judge(one)
    assert found.outcome == "proven", found
    assert found.evidence[0] == "both on host1: nothing leaves it, nothing to encrypt"
    assert names(replace(one, at_sender=replace(quiet, marker=(LEAK,)))) == ["clear-text"]


def test_esp_is_judged_by_its_rules_and_states() -> None:
    mark = '-A OUTPUT -p udp -m udp --dport 4789 -m u32 --u32 "...=0x100100" -j MARK --set-xmark 0xd0c4e3/0xffffffff'
    drop = '-A INPUT -p udp -m udp --dport 4789 -m u32 --u32 "...=0x100100" -m policy --dir in --pol none -j DROP'
    both = frozenset({("10.0.0.1", "10.0.0.3", 1), ("10.0.0.3", "10.0.0.1", 2)})
    ends = replace(MTA, data_path="10.0.0.1"), replace(MDA, data_path="10.0.0.3")
    one = State(ready="yes", marks=(mark,), drops=(drop,), states=both, aead=True)
    good = replace(GOOD, backend="ipsec", sender=ends[0], receiver=ends[1], states={"host1": one, "host3": one}, mtu=0)
    assert verdict.judge(good).outcome == "proven", verdict.judge(good)
    for name, changes in (
        ("mark-missing", {"marks": ()}),
        ("drop-missing", {"drops": ()}),
        ("no-states", {"states": frozenset()}),
    ):
        bad = replace(good, states={"host1": replace(one, **changes), "host3": one})  # type: ignore[arg-type]
        assert (verdict.judge(bad).outcome, names(bad)) == ("broken", [name])


@given(st.sets(st.sampled_from(sorted(UNKNOWN)), min_size=1), st.booleans())
def test_nothing_unknown_is_ever_proven(which: set[str], leak: bool) -> None:
    evidence = GOOD
    for name in which:
        planted = UNKNOWN[name]
        changes = {
            field: getattr(planted, field)
            for field in GOOD.__dataclass_fields__
            if getattr(planted, field) != getattr(GOOD, field)
        }
        evidence = replace(evidence, **changes)
    if leak:
        evidence = replace(evidence, forgeries=(Forgery("as a peer", True, True),))
    assert verdict.judge(evidence).outcome == ("broken" if leak else "unknown")


# ---- the state of a host ----


def test_what_a_host_prints_is_read() -> None:
    text = """
@@directory
/run/swarmmail-verify.abc
@@clock
1000
@@links
[{"ifindex":1,"ifname":"lo","flags":["LOOPBACK"]},{"ifindex":2,"ifname":"eth0","flags":["UP"]},
 {"ifindex":3,"ifname":"swarmmail","flags":["UP"]},{"ifindex":4,"ifname":"docker_gwbridge","flags":[]},
 {"ifindex":5,"ifname":"veth1","master":"docker_gwbridge","flags":[]},{"ifindex":6,"ifname":"bond0","flags":[]}]
@@tunnel
[{"ifname":"swarmmail","addr_info":[{"local":"10.90.0.1"}]}]
@@key
ONE=
@@port
51820
@@endpoints
THREE=\t198.18.0.13:51820
TWO=\t(none)
@@allowed
THREE=\t10.90.0.3/32
TWO=\t10.90.0.2/32
@@handshakes
THREE=\t940
TWO=\t0
@@blackhole
[{"type":"blackhole","dst":"10.90.0.0/24"}]
@@guard
table inet swarmmail {
  iifname != "swarmmail" udp dport 4789 counter drop
}
@@states
src 198.18.0.11 dst 198.18.0.13
\tproto esp spi 0x0000abcd reqid 13681891 mode transport
\taead rfc4106(gcm(aes)) <<Keys hidden>> 64
@@forwarding
[{"mac":"02:42:0A:5a:01:02","ifname":"vxlan0","dst":"10.90.0.3","state":"permanent"}]
@@task 77
[{"ifname":"eth0","mtu":1370,"addr_info":[{"local":"10.90.1.3"}]}]
@@ready
yes
"""
    found = state.parse(text)
    assert (found.directory, found.ready, found.tunnel, found.port) == (
        "/run/swarmmail-verify.abc",
        "yes",
        "10.90.0.1",
        51820,
    )
    assert found.ignore == {1, 3, 4, 5}
    assert found.peer_at("10.90.0.3") == Peer("10.90.0.3", ("198.18.0.13", 51820), 60.0)
    assert found.peer_at("10.90.0.2") == Peer("10.90.0.2", None, None)
    assert found.covered("10.90.0.3") and not found.covered("10.91.0.3")
    assert (found.guards_in, found.guards_out) == (True, False)
    assert found.states == {("198.18.0.11", "198.18.0.13", 0xABCD)} and found.aead
    assert found.forwarding == {"02:42:0a:5a:01:02": "10.90.0.3"}
    assert found.mtus == {77: {"10.90.1.3": 1370}}


@given(st.text())
def test_no_text_of_a_host_breaks_the_reading(text: str) -> None:
    state.parse(text)
