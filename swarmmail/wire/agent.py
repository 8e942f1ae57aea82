"""Runs on a host, not here: it speaks from inside a task's network namespace, and forges packets beside Docker.

Sent by standard input to ``python3 -`` (``capture.ask``), so it needs Python 3.9 and nothing else. One job in, one JSON
object out. It writes no file and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from typing import Any

TIMEOUT = 4.0  # seconds for one answer
ETHERNET = 1  # ARPHRD_ETHER
UDP = 17


# ---- in a task's network namespace ----


def speak(job: dict[str, Any]) -> dict[str, Any]:
    """Say the marker to an SMTP or LMTP server: ``NOOP <marker>``, which changes nothing (RFC 5321, 4.1.1.9).

    An answer to the last command shows that all before it arrived, since TCP keeps the order.
    """
    try:
        with socket.create_connection((job["address"], job["port"]), timeout=TIMEOUT) as sock:
            stream = sock.makefile("rb")
            greeting = stream.readline(1000)
            answers = 0
            for _ in range(job["times"]):
                sock.sendall(b"NOOP " + job["marker"].encode() + b"\r\n")
                if not stream.readline(1000):
                    break
                answers += 1
            sock.sendall(b"QUIT\r\n")
            return {"greeting": greeting[:3].decode("ascii", "replace"), "answers": answers}
    except OSError as error:
        return {"answers": 0, "error": str(error)}


def letter(job: dict[str, Any]) -> dict[str, Any]:
    """Deliver a large message by LMTP (RFC 2033); ``status`` is the server's last answer."""
    line = b"x" * 76 + b"\r\n"
    began = time.monotonic()
    try:
        with socket.create_connection((job["address"], job["port"]), timeout=TIMEOUT) as sock:
            sock.settimeout(20)
            stream = sock.makefile("rb")

            def answer() -> str:
                while True:
                    text = stream.readline(2000).decode("ascii", "replace").strip()
                    if text[3:4] != "-":
                        return text

            answer()
            for words in ("LHLO verify.swarmmail", "MAIL FROM:<>", f"RCPT TO:<{job['recipient']}>", "DATA"):
                sock.sendall(words.encode() + b"\r\n")
                said = answer()
                if said[:1] not in "23" or not said:
                    return {"status": said or "the connection ended", "at": words.split()[0]}
            sock.sendall(f"Subject: {job['marker']}\r\n\r\n".encode())
            sock.sendall(line * (job["bytes"] // len(line)) + b".\r\n")
            said = answer()
            sock.sendall(b"QUIT\r\n")
            return {"status": said or "the connection ended", "seconds": time.monotonic() - began}
    except OSError as error:
        return {"status": str(error), "at": "the connection"}


def say(job: dict[str, Any]) -> dict[str, Any]:
    """Datagrams to a port where nobody listens: for tasks that have no server."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(job["times"]):
                sock.sendto(job["payload"].encode(), (job["address"], job["port"]))
    except OSError as error:
        return {"error": str(error)}
    return {}


# ---- in the host's network namespace ----


def control(job: dict[str, Any]) -> dict[str, Any]:
    """The marker in clear, in datagrams that go exactly the way of the encrypted ones: same addresses, same ports.

    A raw socket, because the ports belong to WireGuard (or to VXLAN). The other end drops what it can't read.
    """
    payload = job["payload"].encode() if "payload" in job else bytes.fromhex(job["hex"])
    family = socket.AF_INET6 if ":" in job["address"] else socket.AF_INET
    header = struct.pack("!HHHH", job["from"], job["port"], 8 + len(payload), 0)
    try:
        with socket.socket(family, socket.SOCK_RAW, UDP) as sock:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, 7, 6)  # IPV6_CHECKSUM: the kernel fills it in (ipv6(7))
            for _ in range(job["times"]):
                sock.sendto(header + payload, (job["address"], 0))
    except OSError as error:
        return {"error": str(error)}
    return {}


def forge(job: dict[str, Any]) -> dict[str, Any]:
    """Send VXLAN datagrams (RFC 7348) that no kernel's VXLAN made, below its firewall (packet(7)).

    ``job["packets"]``: each has outer source and target, VNI, inner addresses and a token.
    """
    way = _way(job["via"])
    if not way:
        return {"error": f"no way to {job['via']}"}
    device, hardware, kind = way
    sent = 0
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
            for packet in job["packets"]:
                frame = _outer(packet, job["port"])
                for _ in range(2):
                    sock.sendto(frame, (device, 0x0800, 0, kind, hardware))
                    sent += 1
                time.sleep(0.002)
    except OSError as error:
        return {"error": str(error), "sent": sent}
    return {"sent": sent}


def _way(address: str) -> tuple[str, bytes, int] | None:
    """Device, hardware address of the next hop and kind of the device, for packets to ``address``."""
    route = json.loads(_ip("-j", "route", "get", address) or "[]")
    if not route:
        return None
    device, hop = route[0].get("dev", ""), route[0].get("gateway", address)
    links = json.loads(_ip("-j", "link", "show", "dev", device) or "[]")
    if not links:
        return None
    if links[0].get("link_type") == "loopback":
        return device, bytes(6), 772
    if links[0].get("link_type") != "ether":
        return device, b"", 65534
    for _ in range(20):
        for entry in json.loads(_ip("-j", "neigh", "show", hop, "dev", device) or "[]"):
            if "lladdr" in entry:
                return device, bytes.fromhex(entry["lladdr"].replace(":", "")), ETHERNET
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", (hop, 9))  # so that the kernel asks for it
        time.sleep(0.05)
    return None


def _ip(*words: str) -> str:
    env = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False, env=env).stdout.strip()


def _outer(packet: dict[str, Any], port: int) -> bytes:
    inner_data = packet["token"].encode()
    inner_udp = struct.pack("!HHHH", 40000, 9, 8 + len(inner_data), 0) + inner_data
    inner = _ipv4(packet["inner_source"], packet["inner_target"], inner_udp)
    frame = _mac(packet["inner_target_mac"]) + _mac(packet["inner_source_mac"]) + b"\x08\x00" + inner
    vxlan = struct.pack("!II", 0x08000000, packet["vni"] << 8) + frame
    return _ipv4(packet["source"], packet["target"], struct.pack("!HHHH", 50000, port, 8 + len(vxlan), 0) + vxlan)


def _ipv4(source: str, target: str, payload: bytes) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(payload),
        0x5357,
        0,
        64,
        UDP,
        0,
        socket.inet_aton(source),
        socket.inet_aton(target),
    )
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:] + payload


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def main(jobs: list[dict[str, Any]]) -> None:
    """Do the jobs, print a list of answers."""
    doors = {"speak": speak, "letter": letter, "say": say, "control": control, "forge": forge}
    answers = []
    for job in jobs:
        answers.append(doors[job["do"]](job))
    json.dump(answers, sys.stdout)
