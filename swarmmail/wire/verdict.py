"""The verdict on a pair of tasks, from what was seen on both their hosts. Pure.

``proven`` needs three things at once: the marker arrived, nothing of it could be read on the way although the same
capture and judge did read the control, and no forged packet was delivered. Whatever is missing makes it ``unknown``;
whatever contradicts makes it ``broken``. What is configured can only make a verdict worse, never better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from swarmmail.model import esp
from swarmmail.wire.state import State

if TYPE_CHECKING:
    from swarmmail.wire.judge import Seen

Backend = Literal["wireguard", "ipsec", "none"]
Outcome = Literal["proven", "broken", "unknown"]
PROVEN: Outcome = "proven"
BROKEN: Outcome = "broken"
UNKNOWN: Outcome = "unknown"
LEAST = 3
"""Encrypted packets each way that a conversation of a dozen lines has at least."""
MEND = "fab bootstrap"
AGAIN = "fab verify again"


@dataclass(frozen=True)
class End:
    """One of the two tasks, and its host."""

    host: str
    service: str
    address: str
    """In the overlay."""
    mac: str
    process: int
    data_path: str
    """The address by which the other hosts' overlay should reach this host: with WireGuard, the tunnel's."""


@dataclass(frozen=True)
class Forgery:
    """A forged packet: how it was made, and how far it came."""

    how: str
    reached: bool
    """It was captured at the receiver's host."""
    delivered: bool
    """It was captured inside the task."""


@dataclass(frozen=True)
class Evidence:
    """All that was seen for an ordered pair. ``None``: not seen, because the capture failed."""

    sender: End
    receiver: End
    backend: Backend
    vni: int
    arrived: bool | None
    """The marker was seen inside the receiving task, or its server answered to it. None: that was not measured."""
    datagrams: bool = False
    """Single datagrams arrived, whatever became of the conversation."""
    trouble: str = ""
    """What the speaking end said when the marker did not arrive."""
    at_sender: Seen | None = None
    at_receiver: Seen | None = None
    states: Mapping[str, State] = field(default_factory=dict)
    """By host."""
    dropped: int = 0
    forgeries: tuple[Forgery, ...] = ()
    failed: tuple[str, ...] = ()
    """Parts of the measurement that did not work."""
    alone: bool = False
    """No other host is in the inventory: there is nowhere to send a control to."""
    mtu: int = 0
    """Bytes that a task's link must not exceed; 0 when not computed."""
    letter: str = ""
    """The answer to a large message; empty when none was sent."""

    @property
    def same_host(self) -> bool:
        return self.sender.host == self.receiver.host


@dataclass(frozen=True)
class Cause:
    """Why a pair is not proven. ``name`` is one of a fixed set, for machines."""

    name: str
    outcome: Outcome
    text: str
    mend: str = MEND


@dataclass(frozen=True)
class Verdict:
    pair: str
    outcome: Outcome
    causes: tuple[Cause, ...]
    evidence: tuple[str, ...]

    @property
    def text(self) -> str:
        if self.causes:
            return f"{self.causes[0].text} -> {self.causes[0].mend}"
        return self.evidence[0] if self.evidence else ""


def judge(e: Evidence) -> Verdict:
    """Put the evidence together. The first cause is the one that explains most; a black hole is named as one in any
    case, after what explains it."""
    causes = [*_seen(e), *_in_force(e), *_measured(e)]
    if e.arrived is False:
        words = f" ({e.trouble})" if e.trouble else ""
        text = f"nothing passes from {e.sender.host} to {e.receiver.host}{words}"
        if e.datagrams:
            text = f"{e.receiver.service} on {e.receiver.host} does not answer to {e.sender.host}{words}"
        causes.append(Cause("black-hole", BROKEN, text))
    if e.arrived is None and not any(cause.outcome == UNKNOWN for cause in causes):
        text = f"whether anything passes from {e.sender.host} to {e.receiver.host} was not measured"
        causes.append(Cause("not-measured", UNKNOWN, text, AGAIN))
    causes.sort(key=lambda cause: cause.outcome != BROKEN)
    outcome = causes[0].outcome if causes else PROVEN
    pair = f"{e.sender.service}@{e.sender.host} -> {e.receiver.service}@{e.receiver.host}"
    return Verdict(pair, outcome, tuple(causes), tuple(_evidence(e)))


def _sides(e: Evidence) -> Iterator[tuple[str, Seen | None]]:
    yield e.sender.host, e.at_sender
    if not e.same_host:
        yield e.receiver.host, e.at_receiver


def _seen(e: Evidence) -> Iterator[Cause]:
    """What the captures show."""
    for host, seen in _sides(e):
        if seen is None:
            continue
        if seen.marker:
            yield Cause("clear-text", BROKEN, f"the marker could be read at {host}: {seen.marker[0]}")
        elif seen.clear_count:
            yield Cause(
                "clear-vxlan", BROKEN, f"{seen.clear_count} packets of this network in clear at {host}: {seen.clear[0]}"
            )
    through = [f for f in e.forgeries if f.delivered]
    if through:
        yield Cause(
            "forged",
            BROKEN,
            f"a forged packet was delivered to {e.receiver.service} on {e.receiver.host} ({through[0].how})",
        )
    if e.backend == "none":
        yield Cause("encryption-none", BROKEN, "the network is not encrypted", "set network.encryption, fab bootstrap")


def _in_force(e: Evidence) -> Iterator[Cause]:
    """What is configured on the hosts: it names the reason, and finds what would leak at the next trouble."""
    ends = [(e.receiver, e.receiver)] if e.same_host else [(e.sender, e.receiver), (e.receiver, e.sender)]
    for here, there in ends:
        state = e.states.get(here.host)
        if state is None or state.ready != "yes":
            continue
        other = e.states.get(there.host)
        if e.backend == "wireguard":
            yield from _tunnel(e, here, there, state, other)
        elif e.backend == "ipsec":
            yield from _esp(e, here, there, state)
        if e.mtu and (mtu := state.mtus.get(here.process, {}).get(here.address, 0)) > e.mtu:
            yield Cause(
                "mtu",
                BROKEN,
                f"the link of {here.service} on {here.host} takes {mtu} bytes, the way only {e.mtu}: large mails hang",
                "make the overlay anew: docker network rm on a manager, then fab bootstrap deploy",
            )


def _tunnel(e: Evidence, here: End, there: End, state: State, other: State | None) -> Iterator[Cause]:
    if not (state.guards_in and state.guards_out):
        yield Cause("guard-missing", BROKEN, f"the rule against foreign VXLAN is missing on {here.host}")
    if not state.covered(there.data_path):
        yield Cause(
            "blackhole-missing",
            BROKEN,
            f"the blackhole route is missing on {here.host}: without the tunnel its packets would leave in clear",
        )
    if not state.tunnel:
        yield Cause("tunnel-down", BROKEN, f"the tunnel of {here.host} is down")
        return
    if here is there:
        return
    peer = state.peer_at(there.data_path)
    if peer is None:
        yield Cause("peer-missing", BROKEN, f"the tunnel of {here.host} does not know {there.host}")
    elif other is not None and other.key and state.peers.get(other.key) is not peer:
        yield Cause("wrong-key", BROKEN, f"the tunnel of {here.host} has another key for {there.host} than its own")
    elif peer.handshake is None and not e.arrived:
        port = peer.endpoint[1] if peer.endpoint else state.port
        yield Cause("no-handshake", BROKEN, f"{here.host} and {there.host} never made a handshake: is UDP {port} open?")
    sent_to = state.forwarding.get(there.mac)
    if sent_to and sent_to != there.data_path:
        yield Cause(
            "data-path",
            BROKEN,
            f"{here.host} sends the overlay's packets for {there.host} to {sent_to}, which is not the tunnel",
            f"let {there.host} leave the Swarm, then fab bootstrap (its data-path address is wrong)",
        )


def _esp(e: Evidence, here: End, there: End, state: State) -> Iterator[Cause]:
    if not esp.marked(state.marks, e.vni):
        yield Cause("mark-missing", BROKEN, f"the rule that sends this network through ESP is missing on {here.host}")
    if not esp.guarded(state.drops, e.vni):
        yield Cause("drop-missing", BROKEN, f"the rule against VXLAN in clear is missing on {here.host}")
    if here is there:
        return
    pairs = {(source, target) for source, target, _ in state.states}
    if not {(here.data_path, there.data_path), (there.data_path, here.data_path)} <= pairs:
        yield Cause("no-states", BROKEN, f"{here.host} has no ESP states with {there.host}: is esp4 missing there?")


def _measured(e: Evidence) -> Iterator[Cause]:
    """Whether the measurement itself can be believed."""
    for text in e.failed:
        yield Cause("not-measured", UNKNOWN, text, AGAIN)
    for host, seen in _sides(e):
        state = e.states.get(host)
        if seen is None:
            why = state.ready if state is not None else "the host does not answer"
            yield Cause("no-capture", UNKNOWN, f"no capture at {host}: {why or 'tcpdump did not start'}", AGAIN)
        elif seen.truncated:
            yield Cause("capture-cut", UNKNOWN, f"the capture at {host} is cut off", AGAIN)
        elif not seen.control and not (e.same_host and e.alone):
            yield Cause(
                "no-control",
                UNKNOWN,
                f"the control, a marker in clear, was not found in the capture at {host} ({seen.packets} packets)",
                AGAIN,
            )
        elif not e.same_host and e.arrived and e.backend != "none" and min(seen.out.packets, seen.back.packets) < LEAST:
            yield Cause(
                "no-cipher",
                UNKNOWN,
                f"the marker arrived, but {host} saw only {seen.out.packets} encrypted packets go and "
                f"{seen.back.packets} come: it went another way",
                AGAIN,
            )
    if e.dropped:
        yield Cause("capture-dropped", UNKNOWN, f"{e.dropped} packets were not captured", AGAIN)
    if not e.same_host and e.arrived and not e.forgeries:
        yield Cause("no-forgery", UNKNOWN, "no forged packet was tried", AGAIN)
    if e.letter and not e.letter.startswith("2"):
        yield Cause("large-mail", BROKEN, f"a message of 10 MB was not taken by {e.receiver.host}: {e.letter}")


def _evidence(e: Evidence) -> Iterator[str]:
    if e.same_host:
        yield f"both on {e.sender.host}: nothing leaves it, nothing to encrypt"
    cipher = {"wireguard": "WireGuard", "ipsec": "ESP", "none": "encrypted"}[e.backend]
    for host, seen in _sides(e):
        if seen is not None:
            yield (
                f"{host}: {seen.packets} packets, {cipher} {seen.out.packets} out {seen.back.packets} back, "
                f"in clear: {seen.clear_count} of this network, {seen.marker_count} markers, control {seen.control}"
            )
    if e.forgeries:
        reached = sum(f.reached for f in e.forgeries)
        delivered = sum(f.delivered for f in e.forgeries)
        words = "" if reached else " (the network between lets none through)"
        yield f"forged in {len(e.forgeries)} ways: {reached} reached {e.receiver.host}{words}, {delivered} delivered"
    ages = [
        f"{host} {peer.handshake:.0f} s"
        for host, there in ((e.sender.host, e.receiver), (e.receiver.host, e.sender))
        if (state := e.states.get(host)) and (peer := state.peer_at(there.data_path)) and peer.handshake is not None
    ]
    if ages and not e.same_host:
        yield f"last handshake: {', '.join(ages)} ago"
    if e.letter:
        yield f"message of 10 MB: {e.letter}"
