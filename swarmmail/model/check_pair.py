"""``fab check`` between two hosts: what is to be sent, and what it means that something did not arrive. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from swarmmail.model import network as net
from swarmmail.model.check import CONTROL_PORT, GOSSIP_PORT, Findings, Measured, managers_of
from swarmmail.model.facts import MESH
from swarmmail.model.findings import Finding, error, note, ok, warning
from swarmmail.model.firewall import INBOUND, OUTBOUND, Blocker, Packet
from swarmmail.model.mesh import LOST
from swarmmail.model.network import DATA_PORT

SMALLEST_MTU = 1280
"""Bytes: below that IPv6 does not work, and we do not look."""
TRY_PORT = 20789
"""UDP port of the throw-away VXLAN under ESP: not Docker's, whose packets the throw-away policies must not meet."""
NO_PYTHON = "no python3"
"""Why a host has no agent; it has a finding of its own."""
TUNNEL = "@tunnel"
"""Marks a target that is reached by the running tunnel's address."""
SLOW = 5.0
"""Seconds for 1 MB."""
NO_ANSWER = "no answer"
"""Of a connection that nothing was heard of (``cluster/probe.py``); a transfer's result goes on with a time."""
HANDSHAKE = 6.5
"""Seconds for a connection by the running tunnel: WireGuard repeats a lost handshake after 5."""


@dataclass(frozen=True)
class End:
    """What the agent of one host reported. ``error``: why there is none."""

    error: str = ""
    ports: Mapping[str, str] = field(default_factory=dict)
    """TCP port to ``ours`` (we listen) or ``in use``."""
    sent: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seen: Mapping[tuple[str, str, int], tuple[str, str]] = field(default_factory=dict)
    """(kind, sender, port) to (source address as seen here, the sender's own)."""
    largest: Mapping[str, int] = field(default_factory=dict)
    """Sender to the largest packet in bytes that came whole."""
    transfers: Mapping[str, Any] = field(default_factory=dict)
    """Peer to seconds for 1 MB, or what went wrong."""
    untried: str = ""
    """Why there was no transfer."""
    serves: int = 0
    """TCP port of the transfer inside the tunnel that runs already; 0: it went by a throw-away one."""


# ---- what is sent ----


def sizes(mtu: int) -> list[int]:
    """Packet sizes in bytes to try at once: steps of 4 up to 1500, of 100 above, and the link's own. The largest first:
    a slow host whose buffer is full by then loses the small ones, which say nothing."""
    found = set(range(SMALLEST_MTU, min(mtu, 1500) + 1, 4)) | set(range(1600, mtu + 1, 100)) | {SMALLEST_MTU, mtu}
    return sorted((size for size in found if size <= max(mtu, SMALLEST_MTU)), reverse=True)


def is_manager(m: Measured, host: str) -> bool:
    return m.inventory.hosts[host].role == "manager"


def tcp_ports(m: Measured) -> list[int]:
    """Where an agent listens, as far as the ports are free. With WireGuard they are inside the tunnel only."""
    return [] if m.encryption == "wireguard" else [CONTROL_PORT, GOSSIP_PORT]


def udp_ports(m: Measured, a: str, b: str) -> list[int]:
    if m.encryption == "wireguard":
        return [port] if (port := m.inventory.tunnel_port(b)) else []
    return [DATA_PORT] if hears(m, b, a) else [GOSSIP_PORT, DATA_PORT]


def hears(m: Measured, b: str, a: str) -> bool:
    """``b`` hears ``a`` by gossip: better proof than any datagram of ours, which its agent would have to log."""
    peers = m.facts[b].peers
    return m.running and peers is not None and m.facts[a].node_address in peers and bool(m.facts[a].node_address)


def tunnel_address(m: Measured, host: str) -> str | None:
    """Its address in the running tunnel."""
    if m.encryption != "wireguard" or not m.running:
        return None
    return m.facts[host].mesh.address or None


def targets(m: Measured, a: str, ends: Mapping[str, End]) -> list[dict[str, Any]]:
    """What host ``a`` sends, to each peer that can tell what arrived."""
    found = []
    link = m.facts[a].link_of(m.address(a))
    for b in m.awake:
        if b == a or ends[b].error:
            continue
        tcp = [] if m.encryption == "wireguard" else [CONTROL_PORT] * is_manager(m, b) + [GOSSIP_PORT]
        udp = udp_ports(m, a, b)
        found.append(
            {
                "peer": b,
                "address": m.address(b),
                "udp": udp,
                "esp": m.encryption == "ipsec",
                "tcp": [(port, ends[b].ports.get(str(port)) == "ours") for port in tcp],
                "sizes": sizes(m.facts[a].mtus.get(link or "", 1500)) if udp else [],
                "mtu_port": udp[-1] if udp else 0,
                "wait": 1.5,
            }
        )
        inner = tunnel_address(m, b)
        if inner and tunnel_address(m, a):
            ports = [CONTROL_PORT] * m.facts[b].is_manager + [GOSSIP_PORT]
            found.append(
                {
                    "peer": b + TUNNEL, "address": inner, "udp": [], "esp": False,
                    "tcp": [(port, False) for port in ports], "sizes": [], "mtu_port": 0,
                    "wait": HANDSHAKE,
                }
            )  # fmt: skip
    return found


def datagrams(m: Measured, a: str, ends: Mapping[str, End]) -> list[dict[str, Any]]:
    """The same without TCP, which itself repeats what was lost."""
    return [{**target, "tcp": []} for target in targets(m, a, ends)]


def all_arrived(m: Measured, ends: Mapping[str, End]) -> bool:
    """All that was sent between hosts that can tell, in full size."""
    names = [name for name in m.awake if not ends[name].error]
    return all(passes(m, a, b, ends) for a, b in itertools.combinations(names, 2))


def passes(m: Measured, a: str, b: str, ends: Mapping[str, End]) -> bool:
    """Single packets pass both ways, in full size: only then a transfer can show something new."""
    for x, y in ((a, b), (b, a)):
        wanted = [("udp", x, port) for port in udp_ports(m, x, y)] + [("esp", x, 0)] * (m.encryption == "ipsec")
        if any(key not in ends[y].seen for key in wanted) or _short(m, x, ends[y]):
            return False
    return True


# ---- what it means ----


def judge(m: Measured, ends: Mapping[str, End]) -> Findings:
    """One line for what is well between two hosts, and one for each thing that is not."""
    for name, end in ends.items():
        if end.error and end.error != NO_PYTHON:
            yield warning(name, "agent", end.error, "the pairs with this host were not measured", "fab check", "")
    for a in m.awake:
        for b in m.awake:
            if a != b:
                yield from _pair(m, a, b, ends)
    yield from _inside(m)


def _pair(m: Measured, a: str, b: str, ends: Mapping[str, End]) -> Findings:
    where = f"{a} -> {b}"
    silent = [f"{name}: {ends[name].error}" for name in (a, b) if ends[name].error]
    if silent:
        yield note(where, "pair", f"unknown ({'; '.join(silent)})", "nothing was sent between the two")
        return
    sent, there = ends[a].sent.get(b, {}), ends[b]
    if sent.get("error"):
        yield error(where, "route", sent["error"], "one cannot send to the other", f"ip route get {m.address(b)}", a)
        return
    good: list[str] = []
    for port in [GOSSIP_PORT] if m.encryption != "wireguard" and hears(m, b, a) else []:
        good.append(f"UDP {port} (heard by gossip)")
    for port in udp_ports(m, a, b):
        if ("udp", a, port) in there.seen:
            good.append(f"UDP {port}")
        else:
            yield _blocked(m, a, b, Packet("udp", port), f"UDP {port}", "does not arrive")
    if m.encryption == "ipsec":
        if ("esp", a, 0) in there.seen:
            good.append("ESP")
        else:
            yield _blocked(m, a, b, Packet("esp"), "ESP", "IP protocol 50 (which is not a port) does not arrive")
    for port, result in sent.get("tcp", {}).items():
        if result == "ok":
            good.append(f"TCP {port}")
        else:
            yield _blocked(m, a, b, Packet("tcp", int(port)), f"TCP {port}", result)
    yield from _by_tunnel(m, a, b, ends, good)
    yield from _translated(m, where, a, b, there, good)
    yield from _mtu(m, where, a, there, good)
    yield from _transfer(m, where, a, b, ends, good)
    if good:
        yield ok(where, "pair", ", ".join(good))


def _by_tunnel(m: Measured, a: str, b: str, ends: Mapping[str, End], good: list[str]) -> Findings:
    for port, result in ends[a].sent.get(b + TUNNEL, {}).get("tcp", {}).items():
        if result == "ok":
            good.append(f"TCP {port} by the tunnel")
            continue
        packet = _complete(m, a, b, Packet("tcp", int(port)), tunnel=True)
        at = m.probes[b].firewall.drops(packet, INBOUND) if b in m.probes else None
        if at is None:  # with a rule, `_inside` tells it once a host
            lost = _inside_of(m, a, b) if result == NO_ANSWER else None
            yield warning(
                f"{a} -> {b}", f"TCP {port} by the tunnel", result,
                "the Swarm's members talk by it (bootstrap repairs the tunnel)",
                f"systemctl restart wg-quick@{MESH} && systemctl restart docker", lost or b,
            )  # fmt: skip


def _translated(m: Measured, where: str, a: str, b: str, there: End, good: list[str]) -> Findings:
    pairs = {sources for (_, sender, _), sources in there.seen.items() if sender == a}
    translated = sorted({(seen, own) for seen, own in pairs if own and seen != own})
    if not translated:
        if pairs:
            good.append("no NAT")
        return
    seen, own = translated[0]
    text = f"{own} is seen as {seen}: a router translates"
    if m.encryption == "wireguard":
        spec = m.inventory.hosts[a]
        expected = spec.nat or seen == spec.advertise

        if expected:
            yield note(where, "NAT", text, "WireGuard can do with that")
        else:
            yield warning(
                where, "NAT", text, f"others send to {spec.advertise}: does that reach it?",
                f"inventory: hosts.{a}.nat: true (or hosts.{a}.advertise: {seen})", "",
            )  # fmt: skip
    else:
        yield error(
            where, "NAT", text, "ESP and VXLAN of Docker do not pass a translating router (moby#37115)",
            "inventory: network.encryption: wireguard", "",
        )  # fmt: skip


def _wanted_mtu(m: Measured) -> int:
    """Bytes of the largest packet that the overlay sends or will send over the underlay."""
    there = m.swarm.networks.get(m.inventory.network.name) if m.swarm is not None else None
    if there is not None and there.mtu.isdecimal():
        return int(there.mtu) + (net.WIREGUARD_OVERHEAD if m.encryption == "wireguard" else 0)
    return m.design.underlay_mtu if m.design is not None else net.underlay_mtu(m.awake, m.inventory)


def _short(m: Measured, a: str, there: End) -> bool:
    """The largest packet that came whole is smaller than what the overlay will send; probed in steps of 4."""
    return 0 < there.largest.get(a, 0) < _wanted_mtu(m) - 3


def _mtu(m: Measured, where: str, a: str, there: End, good: list[str]) -> Findings:
    largest, wanted = there.largest.get(a, 0), _wanted_mtu(m)
    if not largest:
        return
    if not _short(m, a, there):
        good.append(f"path MTU {min(largest, wanted)}")
        return
    why = "small mails pass and large ones hang: packets that are too long vanish"
    if m.swarm is not None and m.inventory.network.name in m.swarm.networks:
        why += "; the overlay was made with the larger one and must be made anew"
    yield error(
        where, "path MTU", f"{largest} bytes pass, the overlay is made for {wanted}", why,
        f"inventory: network.mtu: {largest}", "",
    )  # fmt: skip


def _transfer(m: Measured, where: str, a: str, b: str, ends: Mapping[str, End], good: list[str]) -> Findings:
    untried = ends[a].untried or ends[b].untried
    result = ends[a].transfers.get(b)
    if result is None:
        if untried or passes(m, a, b, ends):
            yield note(where, "1 MB by a tunnel", f"not tried: {untried or 'no answer'}")
    elif isinstance(result, int | float) and result < SLOW:
        kind = "the running" if ends[b].serves else "a throw-away"
        good.append(f"1 MB by {kind} tunnel in {result:.2f} s")
    else:
        text = f"{result:.1f} s" if isinstance(result, int | float) else str(result)
        packet = _complete(m, a, b, Packet("tcp", ends[b].serves), tunnel=True)
        if m.encryption == "ipsec":
            packet = _complete(m, a, b, Packet("udp", TRY_PORT))
        its_own_port = ends[b].serves or m.encryption == "ipsec"
        if its_own_port and (not passes(m, a, b, ends) or m.probes[b].firewall.drops(packet)):
            yield note(where, "1 MB by a tunnel", text, "follows from what does not pass, or its port is not let in")
            return
        if isinstance(result, int | float):
            yield warning(
                where, "1 MB by a tunnel", text, "it passes, but a large mail would take minutes",
                f"ping -c 50 -i 0.2 {m.address(b)}", a,
            )  # fmt: skip
            return
        why = "single packets pass, a transfer does not: mail would hang"
        mend = "inventory: network.mtu: 1280, then fab check: if that is it, raise it again"
        if m.encryption == "wireguard" and text.startswith(NO_ANSWER):  # its first packet is small
            why, mend = _unanswered(m, a, b, bool(ends[b].serves))
        yield error(where, "1 MB by a tunnel", text, why, mend, "")


def _unanswered(m: Measured, a: str, b: str, runs: bool) -> tuple[str, str]:
    """Datagrams to the tunnel's port arrive, and the tunnel does not come up: why, and what to do."""
    inside, port = _inside_of(m, a, b), m.inventory.network.tunnel_port
    if inside is None:
        mend = f"inventory: another network.tunnel_port than {port}, should something between know WireGuard"
        return "single packets pass, WireGuard's do not", "fab bootstrap" if runs else mend
    why = f"no answer comes back to {inside} through its router"
    if runs:
        return f"{why}: it may hold a mapping that leads nowhere", (
            f"fab bootstrap: when nothing was heard for {LOST} s, {inside} calls from another port"
        )
    return why, f"let that router take answers to what {inside} sends to UDP {port}"


def _inside_of(m: Measured, a: str, b: str) -> str | None:
    """The one of two hosts that is behind NAT."""
    return next((name for name in (a, b) if m.inventory.hosts[name].nat), None)


def _complete(m: Measured, a: str, b: str, packet: Packet, tunnel: bool = False) -> Packet:
    link = {name: m.facts[name].link_of(m.address(name)) or "" for name in (a, b)}
    if tunnel:
        design = m.design
        inner = {name: str(design.mesh.addresses.get(name, "")) if design and design.mesh else "" for name in (a, b)}
        return Packet(packet.proto, packet.dport, inner[a], inner[b], MESH, MESH)
    return Packet(packet.proto, packet.dport, m.address(a), m.address(b), link[b], link[a])


def _blocked(m: Measured, a: str, b: str, packet: Packet, what: str, measured: str) -> Finding:
    """Something does not arrive: who drops it, if one of the two hosts does?"""
    packet = _complete(m, a, b, packet)
    why = {"udp": "the tunnel" if m.encryption == "wireguard" else "the overlay or the gossip", "tcp": "the Swarm"}
    reason = f"{why.get(packet.proto, 'the encrypted overlay')} needs it"
    for host, hooks in ((b, INBOUND), (a, OUTBOUND)):
        probe = m.probes.get(host)
        if probe is None:
            continue
        at = probe.firewall.drops(packet, hooks)
        if at is not None:
            text = f"{measured}: {host} drops it ({at.place}: {at.text})"
            return error(f"{a} -> {b}", what, text, reason, _allow(m, host, packet, at, hooks), host)
        line = _legacy(probe["legacy"], packet, "INPUT" if hooks is INBOUND else "OUTPUT")
        if line:
            text = f"{measured}: {host} drops it (iptables-legacy: {line})"
            chain, way = ("INPUT", f"-s {packet.saddr}") if hooks is INBOUND else ("OUTPUT", f"-d {packet.daddr}")
            mend = f"iptables-legacy -I {chain} {way} {_iptables(packet)} -j ACCEPT"
            return error(f"{a} -> {b}", what, text, reason, mend, host)
    source = f"the router of {a}" if m.inventory.hosts[a].nat else packet.saddr
    return error(
        f"{a} -> {b}", what, f"{measured}; no rule of the two hosts is to blame", reason,
        f"let {what} from {source} to {packet.daddr} through whatever is between (provider's firewall, security "
        "group, router)", "",
    )  # fmt: skip


def _iptables(packet: Packet) -> str:
    return f"-p {packet.proto}" + (f" --dport {packet.dport}" if packet.dport else "")


def _legacy(text: str, packet: Packet, chain: str) -> str:
    for line in text.splitlines():
        if not re.match(rf"-A {chain} .*-j (DROP|REJECT)", line):
            continue
        proto, port = re.search(r"-p (\S+)", line), re.search(r"--dport (\S+)", line)
        if proto and proto[1] not in (packet.proto, {"esp": "50"}.get(packet.proto)):
            continue
        if (port and port[1] != str(packet.dport)) or re.search(r" -[sd] | --(ctstate|state) ", line):
            continue
        return line
    return ""


def _allow(m: Measured, host: str, packet: Packet, at: Blocker, hooks: tuple[str, ...]) -> str:
    """The narrowest permission, set before what drops, by the tool that keeps the rules of that host."""
    inbound = hooks is INBOUND
    manager = managers_of({host: m.probes[host]}).get(host, [])
    if "ufw" in manager and at.chain.startswith(("ufw", "INPUT", "OUTPUT")):
        way = f"from {packet.saddr}" if inbound else f"out to {packet.daddr}"
        port = f" to any port {packet.dport}" if packet.dport else ""
        return f"ufw allow proto {packet.proto} {way}{port}" if inbound else f"ufw allow {way} proto {packet.proto}"
    if "firewalld" in manager and at.table == "firewalld":
        element = f'port port="{packet.dport}" protocol="{packet.proto}"' if packet.dport else 'protocol value="esp"'
        rule = f'rule family="ipv4" source address="{packet.saddr}" {element} accept'
        return f"firewall-cmd --permanent --add-rich-rule='{rule}' && firewall-cmd --reload"
    if at.family == "ip" and at.table in ("filter", "raw", "mangle"):
        way = f"-s {packet.saddr}" if inbound else f"-d {packet.daddr}"
        table = "" if at.table == "filter" else f"-t {at.table} "
        return f"iptables {table}-I {at.chain} {way} {_iptables(packet)} -j ACCEPT"
    kind = "ip6" if ":" in packet.saddr else "ip"
    way = f"{kind} saddr {packet.saddr}" if inbound else f"{kind} daddr {packet.daddr}"
    match = f"{packet.proto} dport {packet.dport}" if packet.dport else "meta l4proto esp"
    place = f"{at.place} position {at.handle}" if at.handle else at.place
    return f"nft insert rule {place} {way} {match} accept"


def _inside(m: Measured) -> Iterator[Finding]:
    """What a host's filter would drop of the Swarm's traffic inside the tunnel, which need not be there yet."""
    if m.encryption != "wireguard" or m.design is None or m.design.mesh is None:
        return
    wanted = [("tcp", CONTROL_PORT), ("tcp", GOSSIP_PORT), ("udp", GOSSIP_PORT), ("udp", DATA_PORT)]
    for b in m.awake:
        peers = [a for a in m.awake if a != b]
        if not peers or b not in m.probes:
            continue
        dropped = []
        first: Blocker | None = None
        for proto, port in wanted:
            if proto == "tcp" and port == CONTROL_PORT and not is_manager(m, b):
                continue
            at = m.probes[b].firewall.drops(_complete(m, peers[0], b, Packet(proto, port), tunnel=True))
            if at is not None:
                dropped.append(f"{proto.upper()} {port}")
                first = first or at
        if first is None:
            continue
        if first.family == "ip" and first.table == "filter":
            mend = f"iptables -I {first.chain} -i {MESH} -j ACCEPT"
        else:
            place = f"{first.place} position {first.handle}" if first.handle else first.place
            mend = f'nft insert rule {place} iifname "{MESH}" accept'
        if "ufw" in managers_of(m.probes).get(b, []):
            mend = f"ufw allow in on {MESH}"
        yield error(
            b, "inside the tunnel", f"drops {', '.join(dropped)} ({first.place}: {first.text})",
            "the Swarm and the overlay come by the tunnel", mend,
        )  # fmt: skip
