"""The judge on captures whose packets scapy built: what was put in is what must be seen, and nothing else."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN
from scapy.layers.ipsec import AH, ESP
from scapy.layers.l2 import ARP, GRE, CookedLinux, CookedLinuxV2, Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet as Built
from scapy.packet import Raw

from swarmmail.wire.judge import EVIDENCE, Count, NotACapture, Packet, Question, Seen, judge

ETHERNET, RAW, SLL, SLL2 = 1, 101, 113, 276
LINKS = (ETHERNET, RAW, SLL, SLL2)
HERE, THERE, OTHER = ("192.0.2.1", "2001:db8::1"), ("192.0.2.2", "2001:db8::2"), ("198.51.100.9", "2001:db8:9::9")
VNI, TUNNEL = 4097, 51820
MARKER = bytes.fromhex("c1d7a2f05b8e4933a6107fd2e85c9b4417be6320fd985ac33e71840b2d96fa5e")
NONCE = bytes.fromhex("7fa9d31c05e2486b9bd04c66e5f8a112")
QUESTION = Question(frozenset(HERE), frozenset(THERE), VNI, 4789, frozenset({TUNNEL}), MARKER, NONCE)
IPSEC = replace(QUESTION, tunnel_ports=frozenset())
NO = b"\xee" * 9
"""Bytes that stand for padding and other people's data."""


# --- captures


def dice() -> random.Random:
    return random.Random(1)  # noqa: S311


def capture(frames: list[bytes], link: int = SLL2, order: str = "<", nano: bool = False, lengths: int = 0) -> bytes:
    """A pcap file. ``lengths``: how much longer than captured each packet says it was."""
    out = [struct.pack(order + "IHHIIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, 262144, link)]
    for number, frame in enumerate(frames):
        moment = (1_700_000_000 + number // 1000, number % 1000 * (1_000_000 if nano else 1000))
        out.append(struct.pack(order + "IIII", *moment, len(frame), len(frame) + lengths) + frame)
    return b"".join(out)


def framed(packet: bytes, link: int = SLL2, ethertype: int | None = None, vlans: int = 0, interface: int = 2) -> bytes:
    """An IP packet (or anything, of an ethertype) as captured on a link."""
    if ethertype is None:
        ethertype = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    body: Built | bytes = Raw(packet)
    for tag in range(vlans):
        body = Dot1Q(vlan=tag + 5, type=ethertype if tag == 0 else 0x8100) / body
    outer = (0x88A8 if vlans == 2 else 0x8100) if vlans else ethertype
    if vlans == 2:
        body = Dot1AD(vlan=7, type=0x8100) / body.payload
    if link == RAW:
        return packet
    if link == ETHERNET:
        frame = bytes(ether(outer) / body)
        return frame + NO * ((60 - len(frame)) // 9 + 1) if len(frame) < 60 else frame
    if link == SLL:
        return bytes(CookedLinux(proto=outer, src=b"\2\0\0\0\0\1") / body)
    return bytes(CookedLinuxV2(proto=outer, ifindex=interface, src=b"\2\0\0\0\0\1") / body)


def ip(source: str, target: str, upper: Built, *, extended: bool = False, **more: int) -> Built:
    if ":" not in source:
        return IP(src=source, dst=target, **more) / upper
    head = IPv6(src=source, dst=target, **more)
    if extended:
        head = head / IPv6ExtHdrHopByHop(options=[PadN(optdata=NO)]) / IPv6ExtHdrDestOpt(options=[PadN(optdata=NO)])
    return head / upper


def super_frame(packet: bytes) -> bytes:
    """As captured before it is cut into segments: the IP length is 0."""
    at = 2 if packet[0] >> 4 == 4 else 4
    return packet[:at] + b"\0\0" + packet[at + 2 :]


def fragments(packet: Built, size: int, identity: int) -> list[bytes]:
    """The packet cut into IP fragments with ``size`` bytes of payload (a multiple of 8)."""
    whole = bytes(packet)
    if whole[0] >> 4 == 4:
        body, nh = whole[20:], whole[9]
    else:
        body, nh = whole[40:], whole[6]
    cut = []
    for at in range(0, len(body), size):
        more, part = int(at + size < len(body)), Raw(body[at : at + size])
        if whole[0] >> 4 == 4:
            flags = "MF" if more else 0
            cut.append(IP(src=packet.src, dst=packet.dst, proto=nh, id=identity, flags=flags, frag=at // 8) / part)
        else:
            head = IPv6ExtHdrFragment(nh=nh, id=identity, m=more, offset=at // 8)
            cut.append(IPv6(src=packet.src, dst=packet.dst) / head / part)
    return [bytes(one) for one in cut]


def vxlan(vni: int, inside: bytes, flags: int = 0x08) -> Built:
    return UDP(sport=40112, dport=4789, chksum=0) / VXLAN(vni=vni, flags=flags) / Raw(bytes(ether(0x88B5)) + inside)


def wireguard(kind: int, length: int, rng: random.Random, sport: int = TUNNEL, dport: int = TUNNEL) -> Built:
    return UDP(sport=sport, dport=dport) / Raw(bytes([kind, 0, 0, 0]) + rng.randbytes(length - 4))


def ether(ethertype: int = 0x0800) -> Built:
    """With addresses: scapy would ask the network for them by ARP."""
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02", type=ethertype)


def segment(sport: int, dport: int, seq: int = 0, flags: str = "A") -> Built:
    return TCP(sport=sport, dport=dport, seq=seq, flags=flags)  # scapy's own default is a SYN


def esp(spi: int, rng: random.Random, length: int = 64) -> Built:
    return ESP(spi=spi, seq=rng.randrange(1 << 16), data=rng.randbytes(length))


def seen(*packets: Built | bytes, question: Question = QUESTION, link: int = SLL2) -> Seen:
    return judge(capture([framed(bytes(packet), link) for packet in packets], link), question)


# --- by hand


def test_an_sll2_capture_written_by_hand() -> None:
    """Octet by octet, from https://www.tcpdump.org/linktypes/LINKTYPE_LINUX_SLL2.html, RFC 791, 768 and 7348."""
    sll2 = "0800 0000 00000003 0001 04 06 0242c0000201 0000"
    ipv4 = "45 00 0032 0001 4000 40 11 0000 c0000201 c0000202"
    udp = "9cb0 12b5 001e 0000"
    vx = "08 000000 001001 00"
    frame = bytes.fromhex(sll2 + ipv4 + udp + vx + "00" * 14)
    header = bytes.fromhex("d4c3b2a1 0200 0400 00000000 00000000 00000400 14010000")
    record = struct.pack("<IIII", 1_700_000_000, 123_456, len(frame), len(frame))
    found = judge(header + record + frame, QUESTION)
    assert (found.packets, found.truncated, found.clear_count, found.other_vxlan) == (1, False, 1, 0)
    assert found.clear[0] == Packet(
        pytest.approx(1_700_000_000.123456, rel=0, abs=1e-5),
        3,
        "192.0.2.1",
        "192.0.2.2",
        "UDP 40112 > 4789 VXLAN VNI 4097",
    )
    line = "22:13:20.123 interface 3 192.0.2.1 > 192.0.2.2 UDP 40112 > 4789 VXLAN VNI 4097"
    assert str(found.clear[0]) == line
    ignoring = judge(header + record + frame, replace(QUESTION, ignore=frozenset({3})))
    assert (ignoring.packets, ignoring.clear_count) == (0, 0)
    assert judge(header + record + frame, replace(QUESTION, ignore=frozenset({768, 50331648}))).packets == 1


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"\x0a\x0d\x0d\x0a" + bytes(40), "pcapng"),
        (b"hello, this is no capture", "not a pcap"),
        (b"\x1f\x8b\x08\x00" + bytes(40), "not a pcap"),
        (b"h", "not a pcap"),
        (capture([], 147), "link type 147"),
    ],
)
def test_what_is_no_capture_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(NotACapture, match=word):
        judge(data, QUESTION)


def test_a_capture_of_nothing() -> None:
    found = judge(capture([]), QUESTION)
    assert (found.packets, found.truncated, found.marker, found.out, found.spis) == (0, False, (), Count(), frozenset())


@pytest.mark.parametrize(
    "wrong", [{"marker": b"short"}, {"control": b""}, {"control": MARKER}, {"marker": NONCE * 2}, {"vni": 1 << 24}]
)
def test_a_question_that_cannot_be_answered_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"marker|VNI"):
        replace(QUESTION, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("nano", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_every_byte_order_resolution_and_link_type(order: str, nano: bool, link: int) -> None:
    frames = [framed(bytes(IP(src=HERE[0], dst=THERE[0]) / esp(9, dice())), link) for _ in range(3)]
    found = judge(capture(frames, link, order, nano), IPSEC)
    assert found.esp_out == {9: Count(3, 3 * 72)}
    leak = judge(capture([framed(MARKER, link, 0x88B5), *frames], link, order, nano), IPSEC)
    assert leak.marker[0].time == 1_700_000_000
    assert (leak.marker[0].interface, leak.marker_count) == (2 if link == SLL2 else 0, 1)
    later = judge(capture([*frames, framed(MARKER, link, 0x88B5)], link, order, nano), IPSEC)
    assert later.marker[0].time == pytest.approx(1_700_000_000.003, rel=0, abs=1e-5)


def test_evidence_names_the_first_five_and_counts_the_rest() -> None:
    found = seen(*(IP(src=OTHER[0], dst=HERE[0]) / UDP(sport=n, dport=24) / MARKER for n in range(1, 8)))
    assert [packet.what for packet in found.marker] == [f"UDP {n} > 24" for n in range(1, EVIDENCE + 1)]
    assert found.marker_count == 7
    assert MARKER.hex() not in repr(found)


def test_evidence_describes_what_is_not_ip() -> None:
    found = judge(capture([framed(MARKER, ETHERNET, 0x88B5)], ETHERNET), QUESTION)
    assert (found.marker[0].source, found.marker[0].target) == ("02:00:00:00:00:01", "?")
    assert found.marker[0].what == "ethertype 0x88b5"


CARRIERS: dict[str, tuple[Built, str]] = {
    "tcp": (segment(sport=5000, dport=24) / MARKER, "TCP 5000 > 24"),
    "icmp": (ICMP() / MARKER, "ICMP"),
    "gre": (
        GRE(proto=0x0800) / IP(src="10.0.0.1", dst="10.0.0.2") / segment(sport=1, dport=2) / MARKER,
        "GRE TCP 1 > 2",
    ),
    "ipip": (IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / MARKER, "IPIP UDP 1 > 2"),
    "null esp": (ESP(spi=0xA1, seq=1, data=NO + MARKER + NO), "ESP SPI 0x000000a1"),
    "other vxlan": (vxlan(77, MARKER), "UDP 40112 > 4789 VXLAN VNI 77"),
    "unknown": (Raw(MARKER), "IP protocol 253"),
    "wireguard look-alike": (UDP(sport=9, dport=TUNNEL) / (b"\4\0\0\0" + NO + MARKER), f"UDP 9 > {TUNNEL}"),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_marker_in_clear_is_found_whatever_carries_it(carrier: str) -> None:
    upper, what = CARRIERS[carrier]
    packet = (
        IP(src=HERE[0], dst=THERE[0], proto=253) / upper
        if carrier == "unknown"
        else IP(src=OTHER[0], dst=THERE[0]) / upper
    )
    found = seen(packet)
    assert (found.marker_count, found.control) == (1, 0)
    assert found.marker[0].what == what
    assert found.marker[0].target == THERE[0]


def test_vxlan_counts_by_exact_vni_and_valid_flag() -> None:
    pair = {"src": OTHER[0], "dst": "203.0.113.7"}  # between whomever
    packets = [IP(**pair) / vxlan(vni, b"") for vni in (VNI, VNI + 1, VNI - 1, VNI << 8 & 0xFFFFFF, 16, 1)]
    packets.append(IP(**pair) / vxlan(VNI, b"", flags=0))
    packets.append(IP(**pair) / vxlan(VNI, b"", flags=0x88))  # group policy
    packets.append(IP(**pair) / UDP(sport=4789, dport=999) / VXLAN(vni=VNI, flags=8) / b"x")
    packets.append(IP(**pair) / UDP(sport=4788, dport=4790) / Raw(bytes(VXLAN(vni=VNI, flags=8))))
    found = seen(*packets)
    assert (found.clear_count, found.other_vxlan) == (3, 5)
    assert seen(*packets, question=replace(QUESTION, data_port=4790)).clear_count == 1


def test_vxlan_within_another_tenants_vxlan_is_clear_too() -> None:
    inner = ether() / IP(src=HERE[0], dst=THERE[0]) / vxlan(VNI, b"")
    found = seen(IP(src=OTHER[0], dst="203.0.113.7") / UDP(sport=1, dport=4789) / VXLAN(vni=5, flags=8) / inner)
    assert (found.clear_count, found.other_vxlan) == (1, 1)


def test_wireguard_is_told_by_port_type_and_length() -> None:
    rng = dice()
    good = [
        IP(src=HERE[0], dst=THERE[0]) / wireguard(4, 32, rng),
        IP(src=HERE[0], dst=THERE[0]) / wireguard(4, 1424, rng, sport=33001),  # behind address translation
        IPv6(src=THERE[1], dst=HERE[1]) / wireguard(4, 96, rng, dport=33001),
    ]
    bad = [
        IP(src=HERE[0], dst=THERE[0]) / wireguard(4, 33, rng),
        IP(src=HERE[0], dst=THERE[0]) / wireguard(4, 16, rng),
        IP(src=HERE[0], dst=THERE[0]) / wireguard(3, 64, rng),
        IP(src=HERE[0], dst=THERE[0]) / wireguard(4, 64, rng, sport=7, dport=8),
        IP(src=HERE[0], dst=OTHER[0]) / wireguard(4, 64, rng),
        IP(src=HERE[0], dst=THERE[0]) / UDP(sport=TUNNEL, dport=TUNNEL) / (b"\4\0\0\1" + bytes(60)),
    ]
    shakes = [
        IP(src=HERE[0], dst=THERE[0]) / wireguard(1, 148, rng),
        IP(src=THERE[0], dst=HERE[0]) / wireguard(2, 92, rng),
    ]
    found = seen(*good, *bad, *shakes, IP(src=HERE[0], dst=THERE[0]) / wireguard(1, 96, rng))
    assert (found.out, found.back, found.handshakes) == (Count(2, 1456), Count(1, 96), 2)
    assert seen(*good, question=IPSEC).out == Count()


def test_esp_behind_other_headers_and_in_udp() -> None:
    rng = dice()
    packets = [
        ip(HERE[1], THERE[1], esp(1, rng), extended=True),
        IP(src=HERE[0], dst=THERE[0]) / UDP(sport=4500, dport=4500) / Raw(bytes(esp(2, rng))),
        IP(src=THERE[0], dst=HERE[0], proto=51) / AH(nh=50, spi=6, seq=1, payloadlen=4, icv=bytes(12)) / esp(3, rng),
        IP(src=THERE[0], dst=HERE[0]) / UDP(sport=33000, dport=4500) / Raw(bytes(esp(2, rng))),
        IP(src=HERE[0], dst=THERE[0]) / UDP(sport=4500, dport=4500) / Raw(bytes(4) + rng.randbytes(90)),  # IKE
        IP(src=HERE[0], dst=THERE[0]) / UDP(sport=4500, dport=4500) / b"\xff",  # keep-alive
        IP(src=HERE[0], dst=OTHER[0]) / esp(4, rng),
    ]
    found = seen(*packets, question=IPSEC)
    assert found.esp_out == {1: Count(1, 72), 2: Count(1, 72)}
    assert found.esp_back == {3: Count(1, 72), 2: Count(1, 72)}
    assert (found.out, found.back, found.spis) == (Count(2, 144), Count(2, 144), frozenset({1, 2, 3}))


def test_a_packet_cut_by_the_capture_is_told_and_counted_in_full() -> None:
    packet = bytes(IP(src=HERE[0], dst=THERE[0]) / esp(1, dice(), 500))
    found = judge(capture([framed(packet)[:96]], lengths=452), IPSEC)
    assert (found.truncated, found.out) == (True, Count(1, 508))


@pytest.mark.parametrize("family", [0, 1])
def test_a_super_frame_is_searched_to_its_end(family: int) -> None:
    """Over 65,535 bytes: more than an IP header can say, and more than scapy's reader hands out."""
    body = segment(sport=1, dport=24, seq=1) / Raw(NO * 8000 + MARKER)
    packet = (
        IP(src=HERE[0], dst=THERE[0], len=0) / body if family == 0 else IPv6(src=HERE[1], dst=THERE[1], plen=0) / body
    )
    rest = ip(HERE[family], THERE[family], segment(sport=2, dport=24, seq=100) / MARKER[:9])
    after = super_frame(
        bytes(ip(HERE[family], THERE[family], segment(sport=2, dport=24, seq=109) / Raw(MARKER[9:] + NO)))
    )
    assert seen(bytes(packet)).marker_count == 1
    assert seen(rest, after).marker[0].what == "TCP 2 > 24"


def test_a_marker_across_segments_is_the_completing_segments() -> None:
    def piece(at: int, data: bytes, flags: str = "A") -> Built:
        start = (0xFFFFFFF0 + at) % (1 << 32)  # the sequence number wraps within the marker
        return IP(src=HERE[0], dst=THERE[0]) / segment(sport=5000, dport=24, seq=start, flags=flags) / Raw(data)

    found = seen(piece(0, NO), piece(25, MARKER[16:]), piece(9, MARKER[:16]), piece(9, MARKER[:16]))
    assert found.marker_count == 1
    assert found.marker[0].time == pytest.approx(1_700_000_000.002, rel=0, abs=1e-5)
    assert seen(piece(9, MARKER[:16]), piece(26, MARKER[16:])).marker_count == 0  # a byte is missing between
    other = IP(src=THERE[0], dst=HERE[0]) / segment(sport=24, dport=5000, seq=9) / Raw(MARKER[16:])
    assert seen(piece(9, MARKER[:16]), other).marker_count == 0
    # The ports are used again: what follows the second SYN is not of the first connection.
    again = piece(5, b"", flags="S"), piece(6, MARKER[:16]), piece(22, MARKER[16:])
    assert seen(piece(0, NO * 5), *again).marker_count == 1
    # A SYN that is seen late does not tear its own connection apart.
    assert seen(piece(6, MARKER[:16]), piece(5, b"", flags="S"), piece(22, MARKER[16:])).marker_count == 1


def test_a_control_that_tcp_cut_between_nonce_and_marker_is_no_leak() -> None:
    head = IP(src=HERE[0], dst=THERE[0])
    found = seen(head / segment(1, 24, 100) / NONCE, head / segment(1, 24, 116) / MARKER)
    assert (found.control, found.marker_count) == (1, 0)
    inside = seen(head / segment(1, 24, 100) / (NONCE + MARKER[:5]), head / segment(1, 24, 121) / MARKER[5:])
    assert (inside.control, inside.marker_count) == (1, 0)
    apart = seen(head / segment(1, 24, 100) / (NONCE + NO * 9), head / segment(1, 24, 197) / MARKER)
    assert (apart.control, apart.marker_count) == (0, 1)


def test_a_stream_within_a_clear_tunnel_is_joined() -> None:
    def inner(vni: int, at: int, data: bytes) -> Built:
        frame = ether() / IP(src="10.0.1.2", dst="10.0.1.3") / segment(sport=1, dport=24, seq=at) / Raw(data)
        return IP(src=HERE[0], dst=THERE[0]) / UDP(sport=40112, dport=4789) / VXLAN(vni=vni, flags=8) / frame

    assert seen(inner(5, 100, MARKER[:20]), inner(5, 120, MARKER[20:])).marker_count == 1
    assert (
        seen(inner(5, 100, MARKER[:20]), inner(6, 120, MARKER[20:])).marker_count == 0
    )  # two overlays, same addresses


@pytest.mark.parametrize("family", [0, 1])
def test_fragments(family: int) -> None:
    def cut(upper: Built, identity: int, size: int = 16) -> list[bytes]:
        return fragments(ip(HERE[family], THERE[family], upper, extended=True), size, identity)

    marked = cut(UDP(sport=7, dport=8) / Raw(NO + MARKER + NO), 1)
    assert seen(*marked).marker[0].what == "UDP 7 > 8 in fragments"
    assert seen(*reversed(marked)).marker_count == 1
    assert seen(*marked[:-1]).marker_count == 0
    assert seen(*(marked[:3] + marked[4:])).marker_count == 0
    # The identification comes again before the first datagram was whole, at once or much later: both are judged.
    large = cut(UDP(sport=7, dport=8) / Raw(NO + MARKER + NO * 9), 1, 96)[:1]
    small = cut(UDP(sport=9, dport=8) / Raw(NO * 15), 1, 96)
    assert seen(*large, *small).marker_count == 1
    later = [framed(large[0]), *[framed(b"\0", ethertype=0x88B5)] * 31_000, framed(small[1])]
    assert judge(capture(later), QUESTION).marker_count == 1
    # Over two interfaces: each with all of them, and each with a half.
    twice = [framed(one, interface=number) for one in marked for number in (2, 3)]
    assert judge(capture(twice), QUESTION).marker_count == 2
    halves = [framed(one, interface=2 + number % 2) for number, one in enumerate(marked)]
    assert judge(capture(halves), QUESTION).marker_count == 1
    # The identification comes again, the first datagram's end having been lost.
    again = cut(UDP(sport=9, dport=8) / Raw(NO * 3), 1)[:1] + marked
    assert seen(*again).marker_count == 1

    control = cut(UDP(sport=7, dport=8) / Raw(NONCE + NO * 9 + MARKER), 2)
    found = seen(*control)
    assert (found.control, found.marker_count) == (1, 0)
    clear = seen(*cut(vxlan(VNI, NO * 20), 3))
    assert (clear.clear_count, clear.other_vxlan) == (1, 0)
    sealed = seen(*cut(wireguard(4, 320, dice()), 4))
    assert sealed.out == Count(1, 320)


def test_headers_that_hold_each_other_without_end() -> None:
    """A stranger may send anything; the judge must come to an end."""
    deep: Built = UDP() / MARKER
    for _ in range(200):
        deep = IP(src="10.0.0.1", dst="10.0.0.2") / deep
    atomic = IPv6(src="::1", dst="::2") / Raw(bytes([44, 0, 0, 0, 0, 0, 0, 1]) * 7000)
    atomic.nh = 44
    lie = bytearray(bytes(IP(src=OTHER[0], dst=HERE[0], proto=253) / Raw(MARKER)))
    lie[0] = 0x41
    assert seen(deep, atomic, bytes(lie)).marker_count == 2
    nested = [UDP() / MARKER]
    frames: list[bytes] = []
    for level in range(60):
        first, last = fragments(IPv6(src="::1", dst="::2") / nested[-1], 8 * ((len(nested[-1]) + 8) // 16), level)
        frames.insert(0, last)
        nested.append(Raw(first[40:]))
    seen(*frames, first)


# --- properties


@dataclass
class Item:
    """Something put on the wire, and what must be seen of it."""

    frames: list[bytes]
    question: Question = QUESTION
    leak: bool = False
    control: int = 0
    clear: int = 0
    other: int = 0
    handshakes: int = 0
    out: int = 0
    out_bytes: int = 0
    back: int = 0
    back_bytes: int = 0
    esp: dict[int, int] = field(default_factory=dict)


class Wire:
    """Makes items; each has its own ports and identification."""

    def __init__(self, rng: random.Random, link: int) -> None:
        self.rng, self.link, self.number = rng, link, 0
        self.identity = itertools.count(1)

    def finish(self, packet: Built, **what: object) -> Item:
        """Fragmented or not, with VLAN tags or not, a super-frame or not."""
        rng = self.rng
        if rng.random() < 0.3:
            packets = fragments(packet, 8 * rng.randint(2, 12), next(self.identity))
        elif rng.random() < 0.15 and (self.link != ETHERNET or len(packet) > 60):
            packets = [super_frame(bytes(packet))]
        else:
            packets = [bytes(packet)]
        return Item([self.frame(one) for one in packets], **what)  # type: ignore[arg-type]

    def frame(self, packet: bytes, ethertype: int | None = None) -> bytes:
        return framed(packet, self.link, ethertype, self.rng.choice((0, 0, 0, 1, 2)), self.rng.choice((2,)))

    def ends(self, strangers: bool = True) -> tuple[str, str, str]:
        family = self.rng.randrange(2)
        choices = [("out", HERE, THERE), ("back", THERE, HERE)]
        if strangers:
            choices += [("", OTHER, HERE), ("", THERE, OTHER), ("", HERE, HERE)]
        way, source, target = self.rng.choice(choices)
        return way, source[family], target[family]

    def ip(self, source: str, target: str, upper: Built) -> Built:
        return ip(source, target, upper, extended=self.rng.random() < 0.3)

    def bytes(self, low: int = 0, high: int = 300) -> bytes:
        return self.rng.randbytes(self.rng.randint(low, high))

    def noise(self) -> Item:
        rng = self.rng
        _, source, target = self.ends()
        upper = rng.choice(
            [
                UDP(sport=self.number, dport=53) / Raw(self.bytes()),
                segment(sport=self.number, dport=22, seq=rng.randrange(1 << 32)) / Raw(self.bytes()),
                ICMP() / Raw(self.bytes()),
                UDP(sport=self.number, dport=TUNNEL) / Raw(b"\5\0\0\0" + self.bytes(28, 28)),
                segment(sport=self.number, dport=24) / NONCE,  # the nonce alone is nothing
                UDP(sport=self.number, dport=4789) / Raw(b"\0\0\0\0" + VNI.to_bytes(3, "big") + self.bytes(1)),
            ]
        )
        if rng.random() < 0.2:
            other = (
                bytes(ARP(hwsrc="02:00:00:00:00:01", psrc=HERE[0], pdst=THERE[0]))
                if rng.random() < 0.5
                else self.bytes(1)
            )
            return Item([self.frame(other, 0x0806)] if self.link != RAW else [b"\0" + other])
        return self.finish(self.ip(source, target, upper))

    def esp(self) -> Item:
        way, source, target = self.ends()
        upper, length, spi = (
            esp(100 + self.number, self.rng, size := self.rng.randint(20, 400)),
            size + 8,
            100 + self.number,
        )
        if self.rng.random() < 0.3:
            upper = UDP(sport=4500, dport=self.rng.choice((4500, 33333))) / Raw(bytes(upper))
        counts = {way: 1, f"{way}_bytes": length, "esp": {spi: length}} if way else {}
        return self.finish(self.ip(source, target, upper), **counts)

    def wireguard(self) -> Item:
        way, source, target = self.ends()
        upper = wireguard(4, length := 16 * self.rng.randint(2, 90), self.rng)
        return self.finish(self.ip(source, target, upper), **({way: 1, f"{way}_bytes": length} if way else {}))

    def handshake(self) -> Item:
        way, source, target = self.ends()
        upper = wireguard(*self.rng.choice([(1, 148), (2, 92)]), self.rng)
        return self.finish(self.ip(source, target, upper), handshakes=int(bool(way)))

    def vxlan(self) -> Item:
        _, source, target = self.ends()
        vni = self.rng.choice([VNI, VNI, VNI + 1, VNI ^ 1 << self.rng.randrange(24), self.rng.randrange(1 << 24)])
        counts = {"clear": int(vni == VNI), "other": int(vni != VNI)}
        return self.finish(self.ip(source, target, vxlan(vni, self.bytes())), **counts)

    def control(self) -> Item:
        _, source, target = self.ends()
        both = [NONCE, MARKER]
        self.rng.shuffle(both)
        text = self.bytes(0, 90).join((b"", *both, b""))
        if self.rng.random() < 0.5:
            return self.finish(self.ip(source, target, vxlan(VNI + 5, text)), control=1, other=1)
        upper = self.rng.choice([UDP(sport=self.number, dport=9), segment(sport=self.number, dport=9)]) / Raw(text)
        return self.finish(self.ip(source, target, upper), control=1)

    def leak(self) -> Item:
        _, source, target = self.ends()
        text = self.bytes() + MARKER + self.bytes()
        plain: list[Callable[[], Built]] = [
            lambda: UDP(sport=self.number, dport=25) / Raw(text),
            lambda: segment(sport=self.number, dport=24) / Raw(text),
            lambda: ICMP() / Raw(text),
            lambda: GRE(proto=0x1234) / Raw(text),
            lambda: IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / Raw(text),
            lambda: ESP(spi=5, seq=1, data=text),
        ]
        choice = self.rng.randrange(len(plain) + 3)
        if choice < len(plain):
            item = self.finish(self.ip(OTHER[":" in source], target, plain[choice]()), leak=True)
        elif choice == len(plain):
            item = Item([self.frame(text, 0x88B5) if self.link != RAW else b"\0" + text], leak=True)
        else:
            item = self.stream(source, target, text)
        return item

    def stream(self, source: str, target: str, text: bytes) -> Item:
        """Segments that overlap, come twice, and around a wrap of the sequence number."""
        rng = self.rng
        start = (1 << 32) - rng.randint(0, len(text)) if rng.random() < 0.3 else rng.randrange(1 << 32)
        cuts = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(rng.randint(0, 12)))})
        at = text.index(MARKER)
        cuts = sorted({*cuts, at + rng.randint(1, 31)})
        frames = []
        for low, high in itertools.pairwise(cuts):
            if rng.random() < 0.2:
                low, high = max(0, low - rng.randint(0, 20)), high + rng.randint(0, 20)
            tcp = segment(sport=self.number, dport=24, seq=(start + low) % (1 << 32)) / Raw(text[low:high])
            one = self.finish(self.ip(source, target, tcp)).frames
            frames += one * rng.choice((1, 1, 1, 2)) if len(one) == 1 else one
        return Item(frames, leak=True)

    def items(self, kinds: list[str]) -> list[Item]:
        made = []
        for kind in kinds:
            self.number += 1
            made.append(getattr(self, kind)())
        return made

    def mixed(self, items: list[Item]) -> list[tuple[bytes, Item]]:
        """All frames: each item's in any order, among all others."""
        frames = [(frame, item) for item in items for frame in item.frames]
        self.rng.shuffle(frames)
        return frames


PROTECTED = ("noise", "esp", "wireguard", "handshake")
WITNESSES = (*PROTECTED, "vxlan", "control")

a_random = st.integers(0, 1 << 64).map(random.Random)
a_link = st.sampled_from(LINKS)


def kinds(*names: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), max_size=8)


@settings(deadline=None)  # the first packet that scapy builds takes its time
@given(a_random, a_link, kinds(*PROTECTED), st.booleans())
def test_what_is_protected_is_never_called_a_leak(rng: random.Random, link: int, what: list[str], nano: bool) -> None:
    wire = Wire(rng, link)
    frames = [frame for frame, _ in wire.mixed(wire.items(what))]
    found = judge(capture(frames, link, rng.choice("<>"), nano), QUESTION)
    assert (found.marker, found.marker_count, found.control, found.clear_count) == ((), 0, 0, 0)
    assert (found.packets, found.truncated) == (len(frames), False)


@settings(deadline=None)  # the first packet that scapy builds takes its time
@given(a_random, a_link, kinds(*WITNESSES), st.integers(1, 3))
def test_a_planted_marker_is_always_found(rng: random.Random, link: int, what: list[str], leaks: int) -> None:
    wire = Wire(rng, link)
    what += ["leak"] * leaks
    rng.shuffle(what)
    items = wire.items(what)
    found = judge(capture([frame for frame, _ in wire.mixed(items)], link), QUESTION)
    assert found.marker_count >= leaks
    assert len(found.marker) == min(EVIDENCE, found.marker_count)
    assert found.control == sum(item.control for item in items)


@settings(deadline=None)  # the first packet that scapy builds takes its time
@given(a_random, a_link, kinds(*WITNESSES))
def test_counts_are_what_was_sent(rng: random.Random, link: int, what: list[str]) -> None:
    wire = Wire(rng, link)
    items = wire.items(what)
    found = judge(capture([frame for frame, _ in wire.mixed(items)], link), QUESTION)
    for name in ("control", "handshakes"):
        assert getattr(found, name) == sum(getattr(item, name) for item in items), name
    assert found.marker_count == 0  # the control's is no leak
    assert found.clear_count == sum(item.clear for item in items)
    assert found.other_vxlan == sum(item.other for item in items)
    for way in ("out", "back"):
        sent = Count(sum(getattr(i, way) for i in items), sum(getattr(i, f"{way}_bytes") for i in items))
        assert getattr(found, way) == sent, way
        spis = {spi: Count(1, size) for item in items if getattr(item, way) for spi, size in item.esp.items()}
        assert getattr(found, f"esp_{way}") == spis, way


@settings(deadline=None)  # the first packet that scapy builds takes its time
@given(a_random, a_link, kinds(*WITNESSES, "leak"), st.data())
def test_a_file_cut_anywhere_is_judged_as_far_as_it_goes(
    rng: random.Random, link: int, what: list[str], data: st.DataObject
) -> None:
    wire = Wire(rng, link)
    mixed = wire.mixed(wire.items(what))
    whole = capture([frame for frame, _ in mixed], link)
    cut = data.draw(st.integers(1, len(whole)))
    found = judge(whole[:cut], QUESTION)

    ends = [24]
    for frame, _ in mixed:
        ends.append(ends[-1] + 16 + len(frame))
    assert found.truncated == (cut not in ends)
    kept = sum(end <= cut for end in ends) - 1
    intact = {id(item) for _, item in mixed} - {id(item) for _, item in mixed[max(kept, 0) :]}
    if any(item.leak and id(item) in intact for _, item in mixed):
        assert found.marker_count
    assert found.out.packets >= sum(item.out for item in {id(i): i for _, i in mixed}.values() if id(item) in intact)


@settings(deadline=None)  # the first packet that scapy builds takes its time
@given(a_random, a_link, st.data())
def test_bytes_that_were_changed_never_raise(rng: random.Random, link: int, data: st.DataObject) -> None:
    wire = Wire(rng, link)
    frames = [frame for frame, _ in wire.mixed(wire.items([rng.choice((*WITNESSES, "leak")) for _ in range(6)]))]
    whole = bytearray(capture(frames, link))
    for _ in range(data.draw(st.integers(1, 40))):
        whole[rng.randrange(24, len(whole))] = rng.randrange(256)
    judge(bytes(whole), QUESTION)
