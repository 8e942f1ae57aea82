"""The judge: bytes of captures in, what is in them out. Pure.

The file is read by scapy. The headers are walked here, by offsets: scapy takes 0.1 to 0.3 ms a packet (a capture may
hold 50,000), cuts a packet at 65,535 bytes, takes an IPv6 packet of length 0 (a super-frame) for empty, and opens
sockets when its layers are imported. The tests build their packets with scapy and compare.

Whatever cannot be read is passed over, but never unsearched: the marker is sought in all bytes of each packet first.
"""

from __future__ import annotations

import io
import ipaddress
import logging
import struct
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

EVIDENCE = 5
"""So many packets are named as evidence; the rest is counted."""

ETHERNET, RAW, SLL, SLL2 = 1, 101, 113, 276  # https://www.tcpdump.org/linktypes.html
_MAGICS = (b"\xa1\xb2\xc3\xd4", b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\x3c\x4d", b"\x4d\x3c\xb2\xa1")
_FILE_HEADER, _RECORD_HEADER = 24, 16

_IPV4, _IPV6, _BRIDGED = 0x0800, 0x86DD, 0x6558
_VLAN = frozenset({0x8100, 0x88A8, 0x9100})
_IPIP, _TCP, _UDP, _IP6IP, _FRAGMENT, _GRE, _ESP, _AH = 4, 6, 17, 41, 44, 47, 50, 51
_EXTENSIONS = frozenset({0, 43, _FRAGMENT, _AH, 60, 135, 139, 140})
_PROTOCOLS = {1: "ICMP", _IPIP: "IPIP", _IP6IP: "IPv6 in IP", _GRE: "GRE", _AH: "AH", 58: "ICMPv6", 132: "SCTP"}
_ESP_IN_UDP = 4500
_NESTING = 8  # a tunnel in a tunnel in a tunnel: not more than so many
_REASSEMBLY = 30.0  # seconds, as Linux's ipfrag_time: an IPv4 identification comes again soon
_DATAGRAMS = 4096  # incomplete ones kept at once
_RUNS = 256  # pieces of one TCP stream with gaps between them
_NEAR = 1 << 20  # bytes: data so near behind a SYN is of its connection, though it was captured before

_u16 = struct.Struct("!H").unpack_from
_u32 = struct.Struct("!I").unpack_from
_ports = struct.Struct("!HHH").unpack_from


class NotACapture(ValueError):
    """These bytes are no pcap file, or one of a link type that is not understood."""


@dataclass(frozen=True)
class Question:
    """What is looked for in one host's capture, about the pair of it and another host."""

    here: frozenset[str]
    """Addresses by which this host is seen on the wire, IPv4 or IPv6."""
    there: frozenset[str]
    """The other host's addresses."""
    vni: int
    """Of the overlay that must not be seen in clear; 24 bits."""
    data_port: int
    """The swarm's VXLAN UDP port; 4789 by default."""
    tunnel_ports: frozenset[int]
    """UDP ports of WireGuard on either end; none for ipsec."""
    marker: bytes
    """What must not be seen in clear; at least 8 bytes."""
    control: bytes
    """The nonce of what is sent in clear on purpose: of the control, together with the marker in one datagram (or one
    TCP segment), and of forged VXLAN, which is not counted."""
    ignore: frozenset[int] = frozenset()
    """Interface indexes not of the underlay: loopback, the own tunnel, Docker's bridges. Only a capture of link
    type LINUX_SLL2 has them."""

    def __post_init__(self) -> None:
        if len(self.marker) < 8 or len(self.control) < 8:
            raise ValueError("a marker or nonce under 8 bytes may be found by chance")
        if self.marker in self.control or self.control in self.marker:
            raise ValueError("marker and nonce hold one another: leak and control could not be told apart")
        if not 0 <= self.vni < 1 << 24:
            raise ValueError(f"VNI {self.vni} is not of 24 bits")


@dataclass(frozen=True)
class Packet:
    """A packet as evidence: where, when, between whom; never its content."""

    time: float
    """Seconds since 1970, by the capturing host's clock."""
    interface: int
    """Index of the interface on the host; 0 when the link type has none."""
    source: str
    target: str
    """IP addresses of the outermost header; of a packet that is not IP the source's MAC and "?"."""
    what: str
    """Like ``UDP 40112 > 4789 VXLAN VNI 4097`` or ``TCP 51000 > 24``."""

    def __str__(self) -> str:
        moment = datetime.fromtimestamp(self.time, UTC)
        clock = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
        place = f" interface {self.interface}" if self.interface else ""
        return f"{clock}{place} {self.source} > {self.target} {self.what}"


@dataclass(frozen=True)
class Count:
    packets: int = 0
    bytes: int = 0
    """Of the protected payload: ESP with its header, or WireGuard's message; IP and UDP headers are not counted."""


@dataclass(frozen=True)
class Seen:
    """What is in one capture. A packet that passes two interfaces (a bond and its slave) is counted twice."""

    packets: int
    """All that were read on interfaces of the underlay."""
    truncated: bool
    """The file ends within a packet, or a packet was cut by the capture's length limit."""
    marker: tuple[Packet, ...]
    """The first packets, at most 5, that hold the marker in clear and are not the control's. Of one in fragments:
    the first fragment that came. Where the marker stands across TCP segments: the segment that completes it."""
    marker_count: int
    control: int
    """Datagrams that hold both nonce and marker in clear."""
    clear: tuple[Packet, ...]
    """The first packets, at most 5, that are VXLAN in clear of the question's VNI, between whomever."""
    clear_count: int
    other_vxlan: int
    """Packets of VXLAN in clear of other VNIs."""
    out: Count
    """Protected traffic here to there: ESP, or WireGuard's transport data (not its handshakes)."""
    back: Count
    """The same there to here."""
    handshakes: int
    """WireGuard's handshake messages (types 1 and 2) between the two."""
    esp_out: Mapping[int, Count]
    """The ESP of ``out`` by SPI. Other tenants' ESP between the two hosts is told only by it and the xfrm states."""
    esp_back: Mapping[int, Count]

    @property
    def spis(self) -> frozenset[int]:
        """All SPIs of ESP between the two."""
        return frozenset(self.esp_out) | frozenset(self.esp_back)


def judge(capture: bytes, question: Question) -> Seen:
    """What the capture (pcap, not pcapng) holds. A file that was cut anywhere is judged as far as it goes.

    :raises NotACapture: when it is no pcap file, or of a link type that is not understood
    """
    court = _Court(question)
    for frame in _frames(capture, court):
        court.hear(frame)
    return court.close()


def only(capture: bytes, words: Sequence[bytes]) -> bytes:
    """The capture with those packets alone that hold one of ``words`` in clear.

    :raises NotACapture: when it is no pcap file
    """
    kept = [capture[:_FILE_HEADER]]
    for start, end, _, _ in _records(capture):
        record = capture[start:end]
        if any(word in record for word in words):
            kept.append(record)
    return b"".join(kept)


# --- the file


class _Frame:
    """One captured packet, and what was found in its headers on the way (for the evidence)."""

    __slots__ = ("data", "interface", "link", "number", "pair", "time", "trace")

    def __init__(self, number: int, time: float, data: bytes, link: int) -> None:
        self.number, self.time, self.data, self.link = number, time, data, link
        self.interface = 0
        self.pair = b""  # the outermost source's and target's IP address
        self.trace: list[tuple[str, int, int]] = []


def _reader(capture: bytes, file: io.BytesIO) -> Any:
    if not capture:
        raise NotACapture("empty: the capture wrote nothing, not even a file header")
    if capture.startswith(b"\x0a\x0d\x0d\x0a"):
        raise NotACapture("pcapng, not pcap: capture with tcpdump -w, or convert by `editcap -F pcap`")
    if not any(capture[:4] == magic[: len(capture)] for magic in _MAGICS):
        raise NotACapture(f"not a pcap file: it begins with {capture[:4].hex()}")

    from scapy.utils import RawPcapReader  # late: takes 0.2 to 0.5 s

    logging.getLogger("scapy").setLevel(logging.CRITICAL)
    return RawPcapReader(file) if len(capture) >= _FILE_HEADER else None  # type: ignore[arg-type]


def _records(capture: bytes) -> Iterator[tuple[int, int, bytes, Any]]:
    """Where each packet's record begins and ends in the file, its bytes, and what the record says of it."""
    file = io.BytesIO(capture)
    start = _FILE_HEADER
    for data, about in _reader(capture, file) or ():
        end = file.tell()
        if len(data) < about.caplen:  # scapy gives 65,535 bytes at most; super-frames are longer
            data = capture[start + _RECORD_HEADER : end]
        yield start, end, data, about
        start = end


def _frames(capture: bytes, court: _Court) -> Iterator[_Frame]:
    reader = _reader(capture, io.BytesIO(capture))
    if reader is None:
        court.truncated = True
        return
    link = reader.linktype & 0xFFFF  # the high bits tell of checksums behind the frame
    if link not in (ETHERNET, RAW, SLL, SLL2):
        raise NotACapture(f"link type {link} is not understood: capture with `tcpdump -i any -y LINUX_SLL2 -w`")
    fraction = 1e-9 if reader.nano else 1e-6
    read = _FILE_HEADER  # as far as the file was read
    for number, (_, end, data, about) in enumerate(_records(capture)):
        read = end
        if len(data) < about.caplen or about.caplen < about.wirelen:
            court.truncated = True
        yield _Frame(number, about.sec + about.usec * fraction, data, link)
    if read < len(capture):
        court.truncated = True


# --- reassembly


class _Datagram:
    """Fragments of one IP datagram."""

    __slots__ = ("first", "parts", "size", "total", "where")

    def __init__(self, frame: _Frame, where: _Where) -> None:
        self.first, self.where = frame, where
        self.parts: dict[int, bytes] = {}
        self.size = 0
        self.total: int | None = None

    def put(self, offset: int, part: bytes, last: bool) -> bool:
        """False: this fragment is of another datagram with the same identification."""
        if offset in self.parts:
            return self.parts[offset] == part
        self.parts[offset] = part
        self.size += len(part)
        if last:
            self.total = offset + len(part)
        return True

    def runs(self) -> list[tuple[int, bytes]]:
        """The pieces without a gap: offset and bytes."""
        found: list[tuple[int, bytearray]] = []
        for offset, part in sorted(self.parts.items()):
            if found and offset <= (end := found[-1][0] + len(found[-1][1])):
                found[-1][1].extend(part[end - offset :])
            else:
                found.append((offset, bytearray(part)))
        return [(offset, bytes(run)) for offset, run in found]

    def whole(self) -> bool:
        if self.total is None or self.size < self.total:
            return False
        runs = self.runs()
        return len(runs) == 1 and runs[0][0] == 0 and len(runs[0][1]) >= self.total


class _Run(NamedTuple):
    """Bytes of a stream without a gap. Kept are only its ends: what is within was searched as it came."""

    start: int
    end: int
    head: bytes
    tail: bytes


class _Stream:
    """One direction of a TCP connection."""

    __slots__ = ("at", "keep", "opening", "runs")

    def __init__(self, sequence: int, keep: int) -> None:
        self.at, self.keep = sequence, keep
        self.opening: int | None = None
        self.runs: list[_Run] = []

    def is_opened_by(self, sequence: int) -> bool:
        """Whether a SYN with this sequence number can be of the connection seen so far."""
        if self.opening is None:
            start = min((run.start for run in self.runs), default=self.at)
            return (start - sequence - 1) % (1 << 32) < _NEAR
        return self.opening == sequence

    def put(self, sequence: int, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Add a segment. Returns what is before it, what of it is new, what is after it."""
        start = self.at + (sequence - self.at + (1 << 31)) % (1 << 32) - (1 << 31)  # sequence numbers wrap around
        end = self.at = start + len(data)
        keep = self.keep
        left = right = None
        apart = []
        for run in self.runs:
            if run.end < start or run.start > end:
                apart.append(run)
                continue
            if run.start <= start and run.end >= end:
                return b"", b"", b""
            if run.start < start:
                left = run
            elif run.end > end:
                right = run
        new = data[left.end - start if left else 0 : right.start - start if right else len(data)]
        before, after = left.tail if left else b"", right.head if right else b""
        head = left.head if left else b""
        if len(head) < keep:  # then it is the whole run
            head = (head + new[:keep] + after)[:keep]
        tail = right.tail if right else b""
        if len(tail) < keep:
            tail = (before + new[-keep:] + tail)[-keep:]
        apart.append(_Run(left.start if left else start, right.end if right else end, head, tail))
        self.runs = apart[-_RUNS:]
        return before, new, after


# --- the judgement


class _Where(NamedTuple):
    """Whose payload this is."""

    protocol: int
    pair: bytes
    """Source's and target's address, one after the other."""
    inside: tuple[int, ...]
    """VNIs and protocols of the tunnels around: two overlays may use the same addresses."""


class _Leaf(NamedTuple):
    """How the walk through a packet's headers ended."""

    waits: bytes = b""
    """It is a fragment: these bytes are judged with the rest of the datagram."""
    crosses: bool = False
    """The marker stands across the border of this TCP segment."""
    around: bytes = b""
    """The TCP segment with what is before and after it."""


_PLAIN = _Leaf()
_Key = tuple[int | None, _Where, int]


@dataclass
class _Tally:
    packets: int = 0
    bytes: int = 0
    esp: dict[int, Count] = field(default_factory=dict)

    def add(self, length: int, spi: int | None = None) -> None:
        self.packets += 1
        self.bytes += length
        if spi is not None:
            before = self.esp.get(spi, Count())
            self.esp[spi] = Count(before.packets + 1, before.bytes + length)


class _Evidence:
    """The first packets of a kind, and how many there were."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[tuple[int, int, Packet]] = []

    def add(self, frame: _Frame) -> None:
        self.count += 1
        if len(self._first) < EVIDENCE or frame.number < self._first[-1][0]:
            insort(self._first, (frame.number, self.count, _describe(frame)))
            del self._first[EVIDENCE:]

    def packets(self) -> tuple[Packet, ...]:
        return tuple(packet for _, _, packet in self._first)


class _Court:
    """The state while one capture is read."""

    def __init__(self, question: Question) -> None:
        self.question = question
        here = [ipaddress.ip_address(text).packed for text in question.here]
        there = [ipaddress.ip_address(text).packed for text in question.there]
        self.out, self.back = _Tally(), _Tally()
        self.tallies = {a + b: self.out for a in here for b in there} | {b + a: self.back for a in here for b in there}
        self.truncated = False
        self.depth = 0
        self.packets = self.control = self.other_vxlan = self.handshakes = 0
        self.marker, self.clear = _Evidence(), _Evidence()
        self.datagrams: dict[_Key, _Datagram] = {}
        self.streams: dict[tuple[_Where, int], _Stream] = {}
        self.keep = len(question.marker) + len(question.control)

    def hear(self, frame: _Frame) -> None:
        data = frame.data
        ethertype, at = 0, len(data)
        if frame.link == SLL2:
            if len(data) >= 20:
                ethertype, at = _u16(data, 0)[0], 20
                frame.interface = _u32(data, 4)[0]
        elif frame.link == ETHERNET:
            if len(data) >= 14:
                ethertype, at = _u16(data, 12)[0], 14
        elif frame.link == SLL:
            if len(data) >= 16:
                ethertype, at = _u16(data, 14)[0], 16
        elif data:
            ethertype, at = {4: _IPV4, 6: _IPV6}.get(data[0] >> 4, 0), 0
        if frame.interface in self.question.ignore:
            return
        self.packets += 1
        self.examine(frame, data, lambda: self.network(frame, ethertype, data, at, ()))

    def examine(self, frame: _Frame, text: bytes, walk: Callable[[], _Leaf]) -> None:
        """Walk through the headers of a packet or a reassembled datagram, seek the marker in it, decide whose it is."""
        marker, control = self.question.marker, self.question.control
        leaf = walk()
        found = marker in text
        if leaf.waits and found:
            found = marker not in leaf.waits
        if not (found or leaf.crosses):
            return
        if control in text or control in leaf.around:
            self.control += 1
        else:
            self.marker.add(frame)

    def network(self, frame: _Frame, ethertype: int, data: bytes, at: int, inside: tuple[int, ...]) -> _Leaf:
        while ethertype in _VLAN and len(data) >= at + 4:
            ethertype = _u16(data, at + 2)[0]
            at += 4
        if ethertype == _IPV4 and len(data) >= at + 20 and data[at] >> 4 == 4:
            header, total = (data[at] & 15) * 4, _u16(data, at + 2)[0]
            if header < 20:
                return _PLAIN
            pair = data[at + 12 : at + 20]
            frame.pair = frame.pair or pair
            where = _Where(data[at + 9], pair, inside)
            # A super-frame that was not cut into segments yet has length 0; else bytes behind the length are padding.
            end = at + total if total >= header else len(data)
            fragment = _u16(data, at + 6)[0]
            if fragment & 0x3FFF:
                part = data[at + header : end]
                identity = _u16(data, at + 4)[0]
                offset, last = (fragment & 0x1FFF) * 8, not fragment & 0x2000
                return self.fragment(frame, frame.interface, where, identity, offset, part, last)
            return self.transport(frame, where, data, at + header, end)
        if ethertype == _IPV6 and len(data) >= at + 40 and data[at] >> 4 == 6:
            pair, length = data[at + 8 : at + 40], _u16(data, at + 4)[0]
            frame.pair = frame.pair or pair
            end = at + 40 + length if length else len(data)  # 0: a jumbogram or a super-frame
            return self.transport(frame, _Where(data[at + 6], pair, inside), data, at + 40, end)
        frame.trace.append(("ethertype", ethertype, 0))
        return _PLAIN

    def fragment(
        self, frame: _Frame, interface: int | None, where: _Where, identity: int, offset: int, part: bytes, last: bool
    ) -> _Leaf:
        """``interface``: a bond and its slave show the same fragments; kept apart, none is left over."""
        frame.trace.append(("fragment", where.protocol, 0))
        # An IPv6 fragment's protocol may be another header's in each fragment; the first one's counts.
        key = (interface, where._replace(protocol=0) if len(where.pair) == 32 else where, identity)
        datagram = self.datagrams.get(key)
        if datagram and frame.time - datagram.first.time > _REASSEMBLY:
            self.give_up(key)
            datagram = None
        if not datagram or not datagram.put(offset, part, last):
            if datagram:
                self.give_up(key)
            elif len(self.datagrams) >= _DATAGRAMS:
                self.give_up(next(iter(self.datagrams)))
            datagram = self.datagrams[key] = _Datagram(frame, where)
            datagram.put(offset, part, last)
        if offset == 0:
            datagram.where = where
        if datagram.whole():
            self.give_up(key)
        return _Leaf(waits=part)

    def give_up(self, key: _Key) -> None:
        """Judge a datagram by the fragments that came: all of them, or as far as it goes."""
        datagram = self.datagrams.pop(key)
        for offset, run in datagram.runs():
            self.piece(datagram, offset, run)

    def piece(self, datagram: _Datagram, offset: int, run: bytes) -> None:
        def walk() -> _Leaf:
            if offset or self.depth > _NESTING:
                return _PLAIN
            return self.transport(datagram.first, datagram.where, run, 0, len(run))

        self.depth += 1  # one fragment may complete a datagram that is a fragment of another
        self.examine(datagram.first, run, walk)
        self.depth -= 1

    def transport(self, frame: _Frame, where: _Where, data: bytes, at: int, end: int) -> _Leaf:
        """``end``: where the payload ends by the IP header; the capture may have cut it before."""
        have = min(end, len(data))
        protocol = where.protocol
        while protocol in _EXTENSIONS and have >= at + 8:
            if protocol == _AH:
                size = (data[at + 1] + 2) * 4
            elif protocol == _FRAGMENT:
                if _u16(data, at + 2)[0] & 0xFFF9:
                    break
                size = 8  # an "atomic" fragment: the whole datagram
            else:
                size = (data[at + 1] + 1) * 8
            protocol, at = data[at], at + size
        if protocol != where.protocol:
            where = where._replace(protocol=protocol)
        if protocol == _UDP and have >= at + 8:
            return self.udp(frame, where, data, at, end)
        if protocol == _TCP and have >= at + 20:
            return self.tcp(frame, where, data, at, have)
        if protocol == _ESP and have >= at + 8:
            spi = _u32(data, at)[0]
            frame.trace.append(("esp", spi, 0))
            if tally := self.tallies.get(where.pair):
                tally.add(end - at, spi)
            return _PLAIN
        if protocol == _FRAGMENT and len(where.pair) == 32 and have >= at + 8:
            where, position, identity = where._replace(protocol=data[at]), _u16(data, at + 2)[0], _u32(data, at + 4)[0]
            part, last = data[at + 8 : have], not position & 1
            return self.fragment(frame, frame.interface, where, identity, position & 0xFFF8, part, last)
        frame.trace.append(("protocol", protocol, 0))
        if len(where.inside) >= _NESTING:
            return _PLAIN
        if protocol in (_IPIP, _IP6IP):
            ethertype = _IPV4 if protocol == _IPIP else _IPV6
            return self.network(frame, ethertype, data[:have], at, (*where.inside, -protocol))
        if protocol == _GRE and have >= at + 4 and not data[at + 1] & 7:
            inner = at + 4 + 4 * sum(data[at] & bit > 0 for bit in (0x80, 0x20, 0x10))  # checksum, key, sequence number
            return self.ethernet_or_ip(frame, _u16(data, at + 2)[0], data[:have], inner, (*where.inside, -protocol))
        return _PLAIN

    def ethernet_or_ip(self, frame: _Frame, ethertype: int, data: bytes, at: int, inside: tuple[int, ...]) -> _Leaf:
        if ethertype == _BRIDGED:
            if len(data) < at + 14:
                return _PLAIN
            ethertype, at = _u16(data, at + 12)[0], at + 14
        return self.network(frame, ethertype, data, at, inside)

    def udp(self, frame: _Frame, where: _Where, data: bytes, at: int, end: int) -> _Leaf:
        source, target, total = _ports(data, at)
        frame.trace.append(("udp", source, target))
        if total >= 8:
            end = at + total
        at += 8
        have, length = min(end, len(data)), end - at
        question = self.question
        if question.data_port in (source, target) and have >= at + 8 and data[at] & 0x08:  # the I bit: the VNI is valid
            vni = _u32(data, at + 4)[0] >> 8
            frame.trace.append(("vxlan", vni, 0))
            if question.control in data:
                pass  # sent in clear on purpose: a control, or a forgery
            elif vni == question.vni:
                self.clear.add(frame)
            else:
                self.other_vxlan += 1
            if len(where.inside) < _NESTING:
                return self.ethernet_or_ip(frame, _BRIDGED, data[:have], at + 8, (*where.inside, vni))
            return _PLAIN
        tally = self.tallies.get(where.pair)
        if tally is None:
            return _PLAIN
        if _ESP_IN_UDP in (source, target) and have >= at + 8 and (spi := _u32(data, at)[0]):  # SPI 0: IKE
            tally.add(length, spi)
        elif source in question.tunnel_ports or target in question.tunnel_ports:
            kind = data[at : min(at + 4, have)]
            if kind == b"\4\0\0\0" and length >= 32 and length % 16 == 0:
                tally.add(length)
            elif (kind == b"\1\0\0\0" and length == 148) or (kind == b"\2\0\0\0" and length == 92):
                self.handshakes += 1
        return _PLAIN

    def tcp(self, frame: _Frame, where: _Where, data: bytes, at: int, have: int) -> _Leaf:
        ports, sequence = _u32(data, at)[0], _u32(data, at + 4)[0]
        frame.trace.append(("tcp", ports >> 16, ports & 0xFFFF))
        payload = data[at + (data[at + 12] >> 4) * 4 : have]
        opens = data[at + 13] & 2
        if not (payload or opens):
            return _PLAIN
        key = (where, ports)
        stream = self.streams.get(key)
        if stream is None or (opens and not stream.is_opened_by(sequence)):
            stream = self.streams[key] = _Stream(sequence, self.keep)
        if opens:
            stream.opening = sequence
            sequence += 1
        if not payload:
            return _PLAIN
        before, new, after = stream.put(sequence, payload)
        if not (before or after):
            return _PLAIN
        around, border = before + new + after, len(self.question.marker) - 1
        touched = slice(max(0, len(before) - border), len(before) + len(new) + border)
        return _Leaf(crosses=around.find(self.question.marker, touched.start, touched.stop) >= 0, around=around)

    def close(self) -> Seen:
        # Fragments of one datagram may have come over two interfaces (routes of equal cost): tried together now.
        left, self.datagrams = self.datagrams, {}
        for (_, _, identity), datagram in left.items():
            for offset, part in datagram.parts.items():
                last = datagram.total == offset + len(part)
                self.fragment(datagram.first, None, datagram.where, identity, offset, part, last)
        while self.datagrams:
            self.give_up(next(iter(self.datagrams)))
        return Seen(
            packets=self.packets,
            truncated=self.truncated,
            marker=self.marker.packets(),
            marker_count=self.marker.count,
            control=self.control,
            clear=self.clear.packets(),
            clear_count=self.clear.count,
            other_vxlan=self.other_vxlan,
            out=Count(self.out.packets, self.out.bytes),
            back=Count(self.back.packets, self.back.bytes),
            handshakes=self.handshakes,
            esp_out=self.out.esp,
            esp_back=self.back.esp,
        )


def _describe(frame: _Frame) -> Packet:
    """From the outermost IP header to the first VXLAN header, or to the end of what is understood."""
    source, target = _mac(frame), "?"
    if pair := frame.pair:
        half = len(pair) // 2
        source, target = str(ipaddress.ip_address(pair[:half])), str(ipaddress.ip_address(pair[half:]))
    words: list[str] = []
    fragments = False
    for kind, a, b in frame.trace:
        if kind == "fragment":
            fragments = True
        elif kind == "vxlan":
            words.append(f"VXLAN VNI {a}")
            break
        elif kind in ("udp", "tcp"):
            words.append(f"{kind.upper()} {a} > {b}")
        elif kind == "esp":
            words.append(f"ESP SPI 0x{a:08x}")
        elif kind == "ethertype":
            words.append(f"ethertype 0x{a:04x}")
        else:
            words.append(_PROTOCOLS.get(a, f"IP protocol {a}"))
    if fragments:
        words.append("in fragments")
    return Packet(frame.time, frame.interface, source, target, " ".join(words) or "fragment")


def _mac(frame: _Frame) -> str:
    start = {ETHERNET: 6, SLL: 6, SLL2: 12}.get(frame.link)
    address = frame.data[start : start + 6] if start is not None else b""
    return address.hex(":") if len(address) == 6 else "?"
