"""Would a host's own packet filter drop a packet? Read from ``nft -j list ruleset`` (libnftables-json(5)), which also
shows the rules of iptables-nft. Pure.

Says "dropped" only when it is sure: a rule with a match that is not understood here counts as not matching.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

INBOUND = ("ingress", "prerouting", "input")
OUTBOUND = ("output", "postrouting")
_NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "esp": 50}
_PRIORITY_HOOK = {hook: rank for rank, hook in enumerate((*INBOUND, *OUTBOUND))}


@dataclass(frozen=True)
class Packet:
    """The first packet of a conversation, as the filter sees it."""

    proto: str
    """``tcp``, ``udp`` or ``esp``."""
    dport: int = 0
    saddr: str = ""
    daddr: str = ""
    iif: str = ""
    oif: str = ""


@dataclass(frozen=True)
class Blocker:
    """What decides on a packet: a rule, or the policy of a chain (``handle`` 0)."""

    family: str
    table: str
    chain: str
    handle: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.family} {self.table} {self.chain}"


class _Unknown(Exception):
    pass


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)["nftables"]
        return [item for item in found if isinstance(item, dict) and all(isinstance(v, dict) for v in item.values())]
    except (ValueError, KeyError, TypeError):
        return []


class Ruleset:
    """The rules of a host; an unreadable text counts as no rules."""

    def __init__(self, text: str) -> None:
        self.chains: list[dict[str, Any]] = []
        self.rules: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        self.sets: dict[tuple[str, str, str], list[Any]] = {}
        for item in _objects(text):
            if "chain" in item:
                self.chains.append(item["chain"])
            elif "rule" in item:
                rule = item["rule"]
                self.rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule)
            elif "set" in item:
                entry = item["set"]
                self.sets[entry["family"], entry["table"], entry["name"]] = entry.get("elem", [])

    def _base(self, hooks: tuple[str, ...], family: str) -> Iterator[dict[str, Any]]:
        found = [
            c
            for c in self.chains
            if c.get("hook") in hooks and c.get("type") == "filter" and c["family"] in (family, "inet")
        ]
        yield from sorted(found, key=lambda c: (_PRIORITY_HOOK[c["hook"]], c.get("prio", 0)))

    def drops(self, packet: Packet, hooks: tuple[str, ...] = INBOUND) -> Blocker | None:
        """The rule or policy that drops this packet for certain; None when none does."""
        for chain in self._base(hooks, "ip6" if ":" in packet.saddr else "ip"):
            verdict, at = self._walk(chain, packet, 0)
            if verdict == "drop":
                return at
            if verdict is None and chain.get("policy") == "drop":
                return Blocker(
                    chain["family"], chain["table"], chain["name"], 0, f"policy drop of hook {chain['hook']}"
                )
        return None

    def accepts(self, packet: Packet) -> Blocker | None:
        """The rule of an input filter that lets this packet in before anything else decides."""
        for chain in self._base(("input",), "ip"):
            verdict, at = self._walk(chain, packet, 0)
            if verdict == "accept":
                return at
        return None

    def _walk(self, chain: Mapping[str, Any], packet: Packet, depth: int) -> tuple[str | None, Blocker | None]:
        key = (chain["family"], chain["table"], chain["name"])
        if depth > 16:
            return None, None
        for rule in self.rules.get(key, []):
            try:
                verdict = self._rule(rule, packet)
            except (_Unknown, AttributeError, KeyError, IndexError, TypeError, ValueError):
                continue  # not understood, or not of the shape that nft writes
            if verdict is None:
                continue
            kind, target = verdict
            if kind in ("drop", "accept"):
                return kind, Blocker(*key, rule.get("handle", 0), _text(rule["expr"]))
            if kind == "return":
                return None, None
            deeper = self._walk({**chain, "name": target}, packet, depth + 1)
            if deeper[0] is not None:
                return deeper
            if kind == "goto":
                return None, None
        return None, None

    def _rule(self, rule: Mapping[str, Any], packet: Packet) -> tuple[str, str] | None:
        """The verdict of a rule that matches; None when it does not, or has none. Raises _Unknown."""
        for part in rule["expr"]:
            (name, value), *_ = part.items()
            if name == "match":
                if not self._match(rule, value, packet):
                    return None
            elif name in ("counter", "log", "comment", "mangle"):
                continue
            elif name in ("accept", "return"):
                return name, ""
            elif name in ("drop", "reject"):
                return "drop", ""
            elif name in ("jump", "goto"):
                return name, value["target"]
            elif name == "xt" and isinstance(value, dict) and value.get("name") == "REJECT":
                return "drop", ""
            else:
                raise _Unknown
        return None

    def _match(self, rule: Mapping[str, Any], match: Mapping[str, Any], packet: Packet) -> bool:
        seen = _field(match["left"], packet)
        hit = self._in(rule, match["right"], seen)
        if match.get("op") in ("==", "in"):
            return hit
        if match.get("op") == "!=":
            return not hit
        raise _Unknown

    def _in(self, rule: Mapping[str, Any], right: Any, seen: Any) -> bool:
        if isinstance(right, str) and right.startswith("@"):
            return self._in(rule, self.sets.get((rule["family"], rule["table"], right[1:]), []), seen)
        if isinstance(right, list):
            return any(self._in(rule, one, seen) for one in right)
        if isinstance(right, dict):
            (kind, value), *_ = right.items()
            if kind == "set":
                return self._in(rule, value, seen)
            if kind == "range":
                low, high = value
                if isinstance(seen, int):
                    return int(low) <= seen <= int(high)
                return ip_address(low) <= ip_address(seen) <= ip_address(high)  # type: ignore[operator]
            if kind == "prefix":
                return ip_address(seen) in ip_network(f"{value['addr']}/{value['len']}", strict=False)
            if kind == "elem":
                return self._in(rule, value["val"], seen)
            raise _Unknown
        if isinstance(seen, str) and isinstance(right, str) and right.endswith("*"):
            return seen.startswith(right[:-1])
        return str(_NUMBERS.get(str(seen), seen)) == str(_NUMBERS.get(str(right), right))


def _field(left: Mapping[str, Any], packet: Packet) -> Any:
    (kind, value), *_ = left.items()
    if kind == "meta":
        known = {
            "iifname": packet.iif,
            "iif": packet.iif,
            "oifname": packet.oif,
            "oif": packet.oif,
            "l4proto": packet.proto,
        }
        if value.get("key") in known and known[value["key"]]:
            return known[value["key"]]
        if value.get("key") == "nfproto":
            return "ipv6" if ":" in packet.saddr else "ipv4"
    elif kind == "payload":
        protocol, field = value.get("protocol"), value.get("field")
        if protocol in ("tcp", "udp", "th") and field == "dport":
            return packet.dport if protocol in (packet.proto, "th") else -1
        if protocol in ("tcp", "udp") and protocol != packet.proto:
            return -1
        if protocol in ("ip", "ip6") and field in ("saddr", "daddr") and getattr(packet, field):
            return getattr(packet, field)
        if (protocol, field) in (("ip", "protocol"), ("ip6", "nexthdr")):
            return packet.proto
    elif kind == "ct" and value.get("key") == "state":
        return "new"
    raise _Unknown


def _text(expressions: list[dict[str, Any]]) -> str:
    """A rule in few words, about as nft writes it."""
    words = []
    for part in expressions:
        try:
            words.append(_word(part))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            words.append("?")
    return " ".join(word for word in words if word)


def _word(part: Mapping[str, Any]) -> str:
    (name, value), *_ = part.items()
    if name == "match":
        sign = "" if value.get("op") in ("==", "in") else "!= "
        return f"{_left(value['left'])} {sign}{_right(value['right'])}"
    if name in ("jump", "goto"):
        return f"{name} {value['target']}"
    if name == "xt" and isinstance(value, dict):
        return str(value.get("name", "xt"))
    return "" if name == "counter" else str(name)


def _left(left: Mapping[str, Any]) -> str:
    (kind, value), *_ = left.items()
    if not isinstance(value, dict):
        return str(kind)
    return " ".join(str(v) for k, v in value.items() if k in ("protocol", "field", "key"))


def _right(right: Any) -> str:
    if isinstance(right, dict):
        (kind, value), *_ = right.items()
        if kind == "prefix":
            return f"{value['addr']}/{value['len']}"
        if kind == "range":
            return f"{value[0]}-{value[1]}"
        return _right(value)
    if isinstance(right, list):
        return "{ " + ", ".join(_right(one) for one in right) + " }"
    return str(right)
