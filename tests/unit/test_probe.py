"""The agent that ``fab check`` sends to the hosts, talking to itself on the loopback."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from swarmmail.cluster import probe
from swarmmail.model import check_pair

SOURCE = resources.files("swarmmail.cluster").joinpath("probe.py").read_bytes()
LOADER = f"import sys;source=sys.stdin.buffer.read({len(SOURCE)});exec(compile(source,'probe','exec'))"
root = pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")


@contextlib.contextmanager
def agent(*words: str) -> Iterator[Any]:
    process = subprocess.Popen(
        [*words, sys.executable, "-I", "-S", "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout
    given.write(SOURCE)

    def ask(**request: Any) -> dict[str, Any]:
        given.write(json.dumps(request).encode() + b"\n")
        given.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        return answer

    try:
        yield ask
        given.close()
        assert process.wait(10) == 0  # the end of its input ends it
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@root
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_is_sent_is_seen(address: str) -> None:
    port, busy = free_port(), socket.create_server(("127.0.0.1", 0))
    with busy, agent() as ask:
        other = busy.getsockname()[1]
        ready = ask(me="me", token="abc", v6=":" in address, tcp=[port, other])
        assert ready["ports"] == {
            str(port): "ours",
            str(other): "in use" if ":" not in address else ready["ports"][str(other)],
        }
        target = {
            "peer": "me", "address": address, "udp": [4789, 7946], "esp": True, "tcp": [[port, True], [1, False]],
            "sizes": check_pair.sizes(1500), "mtu_port": 4789, "wait": 1.5,
        }  # fmt: skip
        sent = ask(do="send", targets=[target])["sent"]["me"]
        assert sent["own"] == address and not sent["error"]
        assert sent["tcp"] == {str(port): "ok", "1": "Connection refused"}
        seen = ask(do="report", wait=0.2)
        found = {(kind, sender, at): (source, own) for kind, sender, at, source, own in seen["seen"]}
        expected = {
            ("udp", "me", 4789),
            ("udp", "me", 7946),
            ("esp", "me", 0),
            ("mtu", "me", 4789),
            ("tcp", "me", port),
        }
        assert set(found) == expected and set(found.values()) == {(address, address)}
        assert seen["largest"] == {"me": 1500}


@root
def test_others_traffic_and_another_token_are_not_taken() -> None:
    with agent() as ask:
        ask(me="me", token="own", v6=False, tcp=[])  # another test's agent may send meanwhile
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            for data in (b"", b"x" * 100, b"sWmC", b"sWmCabd|you|udp|1|0|1.2.3.4|", b"sWmCown|you|udp|one|0|1.2.3.4|"):
                sock.sendto(data, ("127.0.0.1", 4789))
        assert ask(do="report", wait=0.2) == {"seen": [], "largest": {}}


@root
def test_a_transfer_and_what_is_not_understood() -> None:
    with agent() as ask:
        ask(me="me", token="abc", v6=False, tcp=[])
        port = ask(do="serve", address="127.0.0.1")["port"]
        done = ask(do="fetch", wait=5, peers={"good": ["127.0.0.1", port], "bad": ["127.0.0.1", 1]})["transfers"]
        assert isinstance(done["good"], float) and done["bad"] == "Connection refused"
        assert ask(do="up", address="", mtu=1, peers=[])["error"] == "no tunnel"
        assert ask(do="nonsense")["error"]


def test_who_does_not_answer_is_told_apart_from_who_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(at: tuple[str, int]) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(probe, "connected", connected)
    results: dict[str, Any] = {}
    probe.transfer("away", ("127.0.0.1", 1), 5, results)
    assert results["away"].startswith(check_pair.NO_ANSWER)


def test_without_root_it_says_so() -> None:
    words = ["setpriv", "--bounding-set", "-net_raw"] if os.geteuid() == 0 else []
    with agent(*words) as ask:
        assert "not permitted" in ask(me="me", token="abc", v6=False, tcp=[])["error"]
