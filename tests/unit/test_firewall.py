"""Would a packet be dropped? Rules as ``nft -j list ruleset`` prints them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmmail.model.firewall import OUTBOUND, Packet, Ruleset

UDP = Packet("udp", 51820, "198.18.0.11", "198.18.0.12", "eth0", "eth0")


def match(protocol: str, field: str, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}}


def meta(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}}


def ruleset(*rules: list[dict[str, Any]], policy: str = "accept", hook: str = "input", **chains: list[Any]) -> Ruleset:
    place = {"family": "inet", "table": "t"}
    found: list[dict[str, Any]] = [
        {"chain": {**place, "name": "in", "type": "filter", "hook": hook, "prio": 0, "policy": policy}}
    ]
    for name, own in {"in": list(rules), **chains}.items():
        found += [{"rule": {**place, "chain": name, "handle": n, "expr": expr}} for n, expr in enumerate(own, 1)]
    return Ruleset(json.dumps({"nftables": found}))


DROP, ACCEPT = {"drop": None}, {"accept": None}


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        ([[DROP]], True),
        ([[match("udp", "dport", 51820), DROP]], True),
        ([[match("udp", "dport", 51821), DROP]], False),
        ([[match("tcp", "dport", 51820), DROP]], False),
        ([[match("udp", "dport", 51820, "!="), DROP]], False),
        ([[match("udp", "dport", {"set": [22, {"range": [51000, 52000]}]}), DROP]], True),
        ([[match("th", "dport", {"set": [22, 23]}), DROP]], False),
        ([[match("ip", "saddr", "198.18.0.11"), ACCEPT], [DROP]], False),
        ([[match("ip", "saddr", {"prefix": {"addr": "198.18.0.0", "len": 24}}), ACCEPT], [DROP]], False),
        ([[match("ip", "saddr", {"prefix": {"addr": "10.0.0.0", "len": 8}}), ACCEPT], [DROP]], True),
        ([[match("ip", "protocol", "udp"), {"counter": {"packets": 1, "bytes": 1}}, DROP]], True),
        ([[meta("l4proto", "esp"), DROP]], False),
        ([[meta("l4proto", {"set": ["tcp", "udp"]}), {"reject": {"type": "icmp"}}]], True),
        ([[meta("iifname", "lo"), ACCEPT], [DROP]], True),
        ([[meta("iifname", "eth*"), ACCEPT], [DROP]], False),
        (
            [
                [
                    {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}},
                    ACCEPT,
                ],
                [DROP],
            ],
            True,
        ),
        ([[{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["new"]}}, ACCEPT], [DROP]], False),
        ([[{"xt": {"type": "match", "name": "policy"}}, DROP]], False),
        ([[meta("length", 1330, ">"), DROP]], False),
        ([[match("udp", "dport", 51820), {"xt": {"type": "target", "name": "REJECT"}}]], True),
    ],
)
def test_rules(rules: list[list[dict[str, Any]]], dropped: bool) -> None:
    assert (ruleset(*rules).drops(UDP) is not None) is dropped


def test_policy_jump_goto_and_return() -> None:
    at = ruleset(policy="drop").drops(UDP)
    assert at is not None and at.handle == 0 and at.place == "inet t in" and "policy drop" in at.text
    jump: list[Any] = [{"jump": {"target": "sub"}}]
    assert ruleset(jump, [DROP], sub=[[ACCEPT]]).drops(UDP) is None
    assert ruleset(jump, [DROP], sub=[[{"return": None}]]).drops(UDP) is not None
    inner = ruleset(jump, sub=[[match("udp", "dport", 51820), DROP]]).drops(UDP)
    assert inner is not None and inner.place == "inet t sub" and inner.text == "udp dport 51820 drop"
    assert ruleset([{"goto": {"target": "sub"}}], [DROP], sub=[]).drops(UDP) is None
    assert ruleset([{"goto": {"target": "sub"}}], [ACCEPT], policy="drop", sub=[]).drops(UDP) is not None
    assert ruleset(jump, sub=[jump]).drops(UDP) is None  # a circle ends


def test_hooks() -> None:
    out = ruleset([DROP], hook="output")
    assert out.drops(UDP) is None and out.drops(UDP, OUTBOUND) is not None
    assert ruleset([DROP], hook="forward").drops(UDP) is None
    assert ruleset([DROP], hook="prerouting").drops(UDP) is not None


def test_an_accept_of_one_chain_does_not_end_the_next() -> None:
    place = {"family": "ip", "table": "a"}
    chains = [
        {"chain": {**place, "name": n, "type": "filter", "hook": "input", "prio": p, "policy": "accept"}}
        for n, p in (("first", -10), ("second", 0))
    ]
    rules = [
        {"rule": {**place, "chain": c, "handle": 1, "expr": [v]}} for c, v in (("first", ACCEPT), ("second", DROP))
    ]
    at = Ruleset(json.dumps({"nftables": chains + rules})).drops(UDP)
    assert at is not None and at.chain == "second"


def test_sets_by_name() -> None:
    named = {
        "set": {
            "family": "inet",
            "table": "t",
            "name": "friends",
            "elem": ["198.18.0.11", {"range": ["10.0.0.1", "10.0.0.9"]}],
        }
    }
    body = json.dumps(
        {"nftables": [named, *json.loads(_raw([[match("ip", "saddr", "@friends"), ACCEPT], [DROP]]))["nftables"]]}
    )
    assert Ruleset(body).drops(UDP) is None
    stranger = Packet("udp", 51820, "203.0.113.5", "198.18.0.12", "eth0", "eth0")
    assert Ruleset(body).drops(stranger) is not None


def _raw(rules: list[list[dict[str, Any]]]) -> str:
    place = {"family": "inet", "table": "t"}
    chain = {"chain": {**place, "name": "in", "type": "filter", "hook": "input", "prio": 0, "policy": "accept"}}
    return json.dumps(
        {"nftables": [chain, *({"rule": {**place, "chain": "in", "handle": 1, "expr": r}} for r in rules)]}
    )


@settings(deadline=None)
@given(st.text())
def test_what_is_no_ruleset_drops_nothing(text: str) -> None:
    assert Ruleset(text).drops(UDP) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(json_values, max_size=3), json_values)
def test_strange_rules_break_nothing(expressions: list[Any], right: Any) -> None:
    ruleset([*expressions, DROP], [match("ip", "saddr", right), DROP], [match("udp", "dport", right), DROP]).drops(UDP)
