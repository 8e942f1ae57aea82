"""What the agent forges is what a kernel's VXLAN would send; what it says to a server, and how it hears the answer."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from swarmmail.wire import agent

PACKET = {
    "source": "192.0.2.77",
    "target": "198.18.0.13",
    "vni": 4097,
    "inner_source": "10.90.1.3",
    "inner_target": "10.90.1.2",
    "inner_source_mac": "02:00:00:00:00:01",
    "inner_target_mac": "02:42:0a:5a:01:02",
    "token": "a token",
}


def test_a_forged_packet_is_whole() -> None:
    raw = agent._outer(PACKET, 4789)
    packet = IP(raw)
    assert (packet.src, packet.dst, packet[UDP].dport, packet.len) == ("192.0.2.77", "198.18.0.13", 4789, len(raw))
    again = IP(raw)
    del again.chksum
    assert IP(bytes(again)).chksum == packet.chksum, "the header's checksum is right"
    assert (packet[VXLAN].vni, packet[VXLAN].flags) == (4097, 0x08)
    frame = packet[VXLAN][Ether]
    assert (frame.src, frame.dst) == ("02:00:00:00:00:01", "02:42:0a:5a:01:02")
    assert (frame[IP].src, frame[IP].dst, bytes(frame[UDP].payload)) == ("10.90.1.3", "10.90.1.2", b"a token")


@pytest.fixture
def server() -> Iterator[tuple[int, list[bytes]]]:
    """Greets, and answers each line with 250; what it was told."""
    told: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), sock, sock.makefile("rb") as stream:
                sock.sendall(b"220 here\r\n")
                data = False
                for line in stream:
                    told.append(line)
                    if data and line != b".\r\n":
                        continue
                    data = line == b"DATA\r\n"
                    sock.sendall(
                        b"354 go on\r\n" if data else b"250-more\r\n250 ok\r\n" if b"LHLO" in line else b"250 ok\r\n"
                    )

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], told


def test_the_marker_is_said_and_each_answer_counted(server: tuple[int, list[bytes]]) -> None:
    port, told = server
    answer = agent.speak({"address": "127.0.0.1", "port": port, "marker": "m" * 64, "times": 3})
    assert answer == {"greeting": "220", "answers": 3}
    assert told[:3] == [b"NOOP " + b"m" * 64 + b"\r\n"] * 3


def test_a_large_letter_is_delivered_whole(server: tuple[int, list[bytes]]) -> None:
    port, told = server
    job = {"address": "127.0.0.1", "port": port, "recipient": "a@lab.test", "marker": "m", "bytes": 100_000}
    assert agent.letter(job)["status"] == "250 ok"
    assert told[2] == b"RCPT TO:<a@lab.test>\r\n"
    assert sum(map(len, told)) > 99_000


def test_nobody_there_is_said_not_raised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert agent.speak({"address": "127.0.0.1", "port": port, "marker": "m", "times": 3})["answers"] == 0
    assert "refused" in agent.letter({"address": "127.0.0.1", "port": port, "recipient": "a", "marker": "m"})["status"]


def test_it_runs_from_standard_input_alone() -> None:
    """As on a host: nothing of swarmmail is installed there."""
    script = Path(agent.__file__).read_text() + "\nmain(json.loads('[]'))\n"
    done = subprocess.run([sys.executable, "-I", "-"], input=script, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
