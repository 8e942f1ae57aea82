"""The agent of ``fab check`` on a host: sends to its peers, and says what arrived from them.

Runs on hosts that have nothing but Python 3.9 (no import from swarmmail), comes by standard input and leaves no file.
It obeys one JSON line at a time from standard input and answers each with one line; at the end of the input, after a
signal or after ``LIFE`` seconds it takes away what it made. Arrival is seen by raw sockets: they get a packet after
the host's own input filter and without a bind, so ports in use are tested too, and no service sees a connection more.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

LIFE = 75  # seconds
HANDSHAKES = 17  # seconds for a connection: WireGuard repeats a lost handshake after 5, and two may be lost
MAGIC = b"sWmC"
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3
SO_ATTACH_FILTER = 26
BYTES = 1 << 20
PORT = 7  # inside the throw-away tunnel, whose namespace is empty
SOURCE: bytes = globals().get("source", b"")  # this text, as the command line that runs it has read it
LOADER = "import sys;source=sys.stdin.buffer.read(%d);exec(compile(source,'probe','exec'))" % len(SOURCE)


def run(*words: str, text: str = "") -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{' '.join(words[:4])}: {last}")
    return done.stdout


def only_ours(sock: socket.socket) -> None:
    """Drop in the kernel what does not carry MAGIC 8 bytes behind the IP header (UDP and ESP alike)."""
    (magic,) = struct.unpack("!I", MAGIC)
    code = [(0xB1, 0, 0, 0), (0x40, 0, 0, 8), (0x15, 0, 1, magic), (0x6, 0, 0, 0xFFFF), (0x6, 0, 0, 0)]
    program = b"".join(struct.pack("HBBI", *one) for one in code)
    kept = array.array("B", program)  # a minimal Python has no ctypes
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(code), kept.buffer_info()[0]))


class Agent:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.me, self.token, self.v6 = spec["me"], spec["token"].encode(), spec["v6"]
        self.family = socket.AF_INET6 if self.v6 else socket.AF_INET
        self.lock = threading.Lock()
        # (kind, sender, port) to [source as seen here, the sender's own]
        self.seen: dict[tuple[str, str, int], list[str]] = {}
        self.largest: dict[str, int] = {}  # sender to the largest packet in bytes that came whole
        self.tunnel: Tunnel | None = None
        self.ports: dict[int, str] = {}
        for port in spec["tcp"]:
            self.ports[port] = self.listen(port)
        for kind, proto in (("udp", socket.IPPROTO_UDP), ("esp", 50)):
            sock = socket.socket(self.family, socket.SOCK_RAW, proto)
            for option in (33, socket.SO_RCVBUF):  # SO_RCVBUFFORCE
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, option, 1 << 22)
            if not self.v6:
                only_ours(sock)
            threading.Thread(target=self.watch, args=(kind, sock), daemon=True).start()

    # -- arrival --

    def payload(self, kind: str, port: int, size: int = 0) -> bytes:
        text = b"|".join([self.token, self.me.encode(), kind.encode(), b"%d" % port, b"%d" % size])
        return MAGIC + text + b"|"

    def note(self, data: bytes, source: str, length: int) -> None:
        parts = data[len(MAGIC) :].split(b"|", 6)
        if len(parts) < 6 or parts[0] != self.token:
            return
        sender, kind, port, own = parts[1].decode(), parts[2].decode(), int(parts[3]), parts[5].decode()
        with self.lock:
            self.seen[kind, sender, port] = [source, own]
            if int(parts[4]):
                self.largest[sender] = max(length, self.largest.get(sender, 0))

    def watch(self, kind: str, sock: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError, ValueError, IndexError):
                data, address = sock.recvfrom(65535)
                head = 0 if self.v6 else (data[0] & 15) * 4
                self.note(data[head + 8 :], address[0], len(data) + (40 if self.v6 else 0))

    def listen(self, port: int) -> str:
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("::" if self.v6 else "0.0.0.0", port))
            sock.listen(16)
        except OSError:
            return "in use"
        threading.Thread(target=self.accept, args=(sock, port), daemon=True).start()
        return "ours"

    def accept(self, sock: socket.socket, port: int) -> None:
        while True:
            with contextlib.suppress(OSError, ValueError, IndexError):
                peer, address = sock.accept()
                with peer:
                    peer.settimeout(2)
                    self.note(peer.recv(256), address[0], 0)

    # -- sending --

    def send(self, targets: list[dict[str, Any]]) -> dict[str, Any]:
        results: dict[str, dict[str, Any]] = {}
        threads = []
        for target in targets:
            into = results.setdefault(target["peer"], {"tcp": {}, "own": "", "error": ""})
            threads.append(threading.Thread(target=self.datagrams, args=(target, into), daemon=True))
            for port, hello in target["tcp"]:
                threads.append(threading.Thread(target=self.connect, args=(target, port, hello, into), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(8)
        return {"sent": results}

    def datagrams(self, target: dict[str, Any], into: dict[str, Any]) -> None:
        address = target["address"]
        try:
            with socket.socket(self.family, socket.SOCK_DGRAM) as sock:
                sock.connect((address, 9))
                own = into["own"] = sock.getsockname()[0]
            with socket.socket(self.family, socket.SOCK_DGRAM) as sock:
                level, option = (
                    (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER) if self.v6 else (socket.IPPROTO_IP, IP_MTU_DISCOVER)
                )
                for _ in range(3):
                    for port in target["udp"]:
                        with contextlib.suppress(PermissionError):  # the own filter drops it: it will be missed there
                            sock.sendto(self.payload("udp", port) + own.encode() + b"|", (address, port))
                    if target["esp"]:
                        with contextlib.suppress(PermissionError):
                            self.esp(address, own)
                    time.sleep(0.08)
                sock.setsockopt(level, option, PMTUDISC_PROBE)
                for _ in range(2):
                    for number, size in enumerate(target["sizes"]):
                        data = self.payload("mtu", target["mtu_port"], size) + own.encode() + b"|"
                        with contextlib.suppress(OSError):  # larger than the own link's MTU
                            sock.sendto(
                                data.ljust(size - (48 if self.v6 else 28), b"\0"), (address, target["mtu_port"])
                            )
                        if number % 16 == 15:
                            time.sleep(0.005)
        except OSError as error:
            into["error"] = error.strerror or str(error)

    def esp(self, address: str, own: str) -> None:
        spi = int.from_bytes(os.urandom(4), "big") | 0x80000000
        with socket.socket(self.family, socket.SOCK_RAW, 50) as sock:
            data = self.payload("esp", 0) + own.encode() + b"|"
            sock.sendto(struct.pack("!II", spi, 1) + data.ljust(96, b"\0"), (address, 0))

    def connect(self, target: dict[str, Any], port: int, hello: bool, into: dict[str, Any]) -> None:
        try:
            with socket.create_connection((target["address"], port), timeout=target["wait"]) as sock:
                if hello:
                    sock.sendall(self.payload("tcp", port) + sock.getsockname()[0].encode() + b"|")
            into["tcp"][str(port)] = "ok"
        except socket.timeout:  # noqa: UP041 - an alias of TimeoutError from 3.10 on only
            into["tcp"][str(port)] = "no answer"
        except OSError as error:
            into["tcp"][str(port)] = error.strerror or str(error)

    def report(self, wait: float) -> dict[str, Any]:
        time.sleep(wait)
        with self.lock:
            return {
                "seen": [[kind, sender, port, *sources] for (kind, sender, port), sources in self.seen.items()],
                "largest": dict(self.largest),
            }

    def close(self) -> None:
        if self.tunnel is not None:
            self.tunnel.close()
            self.tunnel = None


class Tunnel:
    """A throw-away link: made here, so that its outer packets are the host's, and moved into an empty namespace, where
    nothing of the host meets it. The namespace ends with the child that holds it, and the link with the namespace."""

    def __init__(self) -> None:
        self.name = f"swmtry{os.getpid() % 1000000}"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.child: Child | None = None
        self.undo: list[str] = []
        self.moved = self.folder = False
        self.port = 0

    def wireguard(self, port: int) -> str:
        with contextlib.suppress(OSError):
            run("ip", "link", "add", self.name, "type", "wireguard")
            return self.keyed(port)
        words = ["wireguard-go", "-f", self.name]
        self.folder = not os.path.exists(os.path.dirname(self.control))
        try:
            self.start("setpriv", "--pdeathsig", "TERM", *words)  # it must not outlive us, even when we are killed
        except FileNotFoundError:
            self.start(*words)
        until = time.monotonic() + 3
        while not os.path.exists(self.control):
            if time.monotonic() > until or self.daemon is None or self.daemon.poll() is not None:
                raise OSError("wireguard-go did not start")
            time.sleep(0.02)
        return self.keyed(port)

    def start(self, *words: str) -> None:
        none = subprocess.DEVNULL
        self.daemon = subprocess.Popen(
            words, stdin=none, stdout=none, stderr=none, env={**os.environ, "LOG_LEVEL": "silent"}
        )

    def keyed(self, port: int) -> str:
        key = run("wg", "genkey")
        run("wg", "set", self.name, "listen-port", str(port), "private-key", "/dev/stdin", text=key)
        self.port = port
        return run("wg", "pubkey", text=key).strip()

    @property
    def control(self) -> str:
        return f"/var/run/wireguard/{self.name}.sock"

    def vxlan(self, vni: int, port: int, peers: list[str], states: dict[str, list[str]] | None) -> None:
        run("ip", "link", "add", self.name, "type", "vxlan", "id", str(vni), "dstport", str(port), "nolearning")
        for peer in peers:
            run("bridge", "fdb", "append", "00:00:00:00:00:00", "dev", self.name, "dst", peer)
        if states:
            # By standard input, as there are keys in it; the kernel ends them by itself should this program not.
            batch = "".join(line + "\n" for line in states["add"])
            self.undo = states["delete"]
            run("ip", "-batch", "-", text=batch)

    def up(self, address: str, mtu: int, peers: list[dict[str, Any]]) -> None:
        for peer in peers:
            words = ["peer", peer["key"], "allowed-ips", peer["inner"] + "/32"] if peer.get("key") else []
            if words and peer["endpoint"]:
                words += ["endpoint", peer["endpoint"]]
            if words and peer["keepalive"]:
                words += ["persistent-keepalive", "1"]
            if words:
                run("wg", "set", self.name, *words)
        self.child = Child()
        run("ip", "link", "set", self.name, "netns", str(self.child.process.pid))
        self.moved = True
        answer = self.child.ask({"link": self.name, "address": address, "mtu": mtu})
        if answer.get("error"):
            raise OSError(answer["error"])
        until = time.monotonic() + 3  # wireguard-go looks once a second whether its link is up
        while self.port and not bound(self.port):
            if time.monotonic() > until:
                raise OSError(f"WireGuard did not open UDP {self.port}")
            time.sleep(0.03)

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
        if self.daemon is not None:
            self.daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemon.wait(2)
            self.daemon.kill()
            with contextlib.suppress(OSError):
                os.unlink(self.control)
            if self.folder:
                with contextlib.suppress(OSError):  # another tunnel came meanwhile
                    os.rmdir(os.path.dirname(self.control))
        if not self.moved:
            subprocess.run(["ip", "link", "del", self.name], capture_output=True, check=False)
        for line in self.undo:
            subprocess.run(["ip", *line.split()], capture_output=True, check=False)


def bound(port: int) -> bool:
    for name in ("udp", "udp6"):
        with contextlib.suppress(OSError), open("/proc/net/" + name) as table:
            if any(line.split()[1].endswith(f":{port:04X}") for line in list(table)[1:]):
                return True
    return False


class Child:
    """This program once more, in a network namespace of its own. The end of its input ends it."""

    def __init__(self) -> None:
        words = ["unshare", "-n", sys.executable, "-I", "-S", "-c", LOADER, "child"]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.to, self.back = self.process.stdin, self.process.stdout
        self.to.write(SOURCE.decode())
        self.to.flush()
        if self.back.readline() != "ready\n":
            raise OSError("no network namespace")

    def ask(self, request: dict[str, Any], wait: float = 10) -> dict[str, Any]:
        self.to.write(json.dumps(request) + "\n")
        self.to.flush()
        if not select.select([self.back], [], [], wait)[0]:
            return {"error": "no answer from the namespace"}
        answer: dict[str, Any] = json.loads(self.back.readline() or '{"error": "the namespace ended"}')
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def child() -> None:
    """In the namespace: set the link up, and do transfers on request."""

    def say(answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    signal.alarm(LIFE)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        try:
            if "link" in request:
                run("ip", "link", "set", "lo", "up")
                run("ip", "addr", "add", request["address"], "dev", request["link"])
                run("ip", "link", "set", request["link"], "mtu", str(request["mtu"]), "up")
                server = socket.socket()
                server.bind(("", PORT))
                server.listen(32)
                threading.Thread(target=serve, args=(server,), daemon=True).start()
                say({})
            else:
                say(
                    {
                        "transfers": transfers(
                            {n: (inner, PORT) for n, inner in request["peers"].items()}, request["wait"]
                        )
                    }
                )
        except Exception as error:
            say({"error": str(error)})
    os._exit(0)


def transfers(peers: dict[str, Any], wait: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    threads = [
        threading.Thread(target=transfer, args=(name, tuple(at), wait, results), daemon=True)
        for name, at in peers.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANDSHAKES + wait + 1)
    return results


def serve(server: socket.socket) -> None:
    def one(peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            peer.settimeout(10)
            got = 0
            while got < BYTES:
                chunk = peer.recv(65536)
                if not chunk:
                    return
                got += len(chunk)
            peer.sendall(b"%d\n" % got)

    while True:
        with contextlib.suppress(OSError):
            peer, _ = server.accept()
            threading.Thread(target=one, args=(peer,), daemon=True).start()


def connected(at: tuple[str, int]) -> socket.socket:
    """Try anew every 2 s, as TCP itself would wait longer each time and might miss the tunnel's coming up."""
    until = time.monotonic() + HANDSHAKES
    while True:
        try:
            return socket.create_connection(at, timeout=2)
        except socket.timeout:  # noqa: UP041 - an alias of TimeoutError from 3.10 on only
            if time.monotonic() > until:
                raise


def transfer(name: str, at: tuple[str, int], wait: float, results: dict[str, Any]) -> None:
    """Into ``results``: the seconds from the connection on, or what went wrong."""
    results[name] = f"no answer within {HANDSHAKES} s"
    sent = 0
    try:
        with connected(at) as sock:
            began = time.monotonic()
            data = os.urandom(65536)
            while sent < BYTES:
                sock.settimeout(max(0.05, wait - (time.monotonic() - began)))
                sent += sock.send(data[: BYTES - sent])
            sock.settimeout(max(0.05, wait - (time.monotonic() - began)))
            sock.recv(32)
        results[name] = round(time.monotonic() - began, 3)
    except socket.timeout:  # noqa: UP041
        if sent:
            results[name] = f"connected, but {sent} of {BYTES} bytes went in {wait:g} s"
    except OSError as error:
        results[name] = error.strerror or str(error)


def obey(agent: Agent, request: dict[str, Any]) -> dict[str, Any]:
    what = request["do"]
    if what == "send":
        return agent.send(request["targets"])
    if what == "report":
        return agent.report(request["wait"])
    if what == "wireguard":
        agent.tunnel = Tunnel()
        return {"key": agent.tunnel.wireguard(request["port"])}
    if what == "vxlan":
        agent.tunnel = Tunnel()
        agent.tunnel.vxlan(request["vni"], request["port"], request["peers"], request["states"])
        return {}
    if what == "serve":  # by a tunnel that runs already
        server = socket.create_server((request["address"], 0))
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        return {"port": server.getsockname()[1]}
    if what == "fetch":
        return {"transfers": transfers(request["peers"], request["wait"])}
    if agent.tunnel is None:
        raise ValueError("no tunnel")
    if what == "up":
        agent.tunnel.up(request["address"], request["mtu"], request["peers"])
        return {}
    if what == "transfer" and agent.tunnel.child is not None:
        wait = request["wait"]
        return agent.tunnel.child.ask({"peers": request["peers"], "wait": wait}, HANDSHAKES + wait + 3)
    raise ValueError(what)


def main() -> None:
    def end(number: int, frame: Any) -> None:
        raise SystemExit(3)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, end)
    signal.alarm(LIFE)
    agent: Agent | None = None
    try:
        for raw in iter(sys.stdin.buffer.readline, b""):
            request = json.loads(raw)
            try:
                if agent is None:
                    agent = Agent(request)
                    answer = {"ports": agent.ports, "clock": time.time()}
                else:
                    answer = obey(agent, request)
            except Exception as error:
                answer = {"error": str(error) or type(error).__name__}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        signal.alarm(0)
        if agent is not None:
            agent.close()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    child() if sys.argv[1:] == ["child"] else main()
