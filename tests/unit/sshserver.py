"""An SSH server in this process, on the loopback: it runs the commands it gets, as sshd would, and counts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

MAX_SESSIONS = 10
"""sshd_config(5): the default."""

_SUDO = """#!/bin/sh
# sudo(8) as far as it is used: -n without a password, -k -S -p '' with it on standard input
if [ "$1" = -n ]; then
    [ -e {free} ] || {{ echo 'sudo: a password is required' >&2; exit 1; }}
    shift
else
    [ "$1 $2 $3 $4" = '-k -S -p ' ] || exit 64
    shift 4
    read -r given
    [ "$given" = "$(cat {password})" ] || {{ echo 'sudo: 1 incorrect password attempt' >&2; exit 1; }}
fi
[ "$1" = -- ] && shift
exec "$@"
"""


def new_user_key(path: Path) -> Any:
    """Make a key as ``ssh-keygen -t ed25519`` does."""
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return paramiko.Ed25519Key.from_private_key_file(str(path))


class Server:
    """``folder`` gets the client's key, its known_hosts, and programs that stand before the machine's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host_key = paramiko.ECDSAKey.generate()
        self.key_file, self.known_hosts = folder / "key", folder / "known_hosts"
        self.commands: list[str] = []
        self.connections = self.sessions = self.peak = self.to_drop = 0
        self.refuse_commands = False
        self.transports: list[Any] = []
        self.lock = threading.Lock()
        folder.mkdir()
        self.user_key = new_user_key(self.key_file)
        programs = folder / "bin"
        programs.mkdir()
        sudo = programs / "sudo"
        sudo.write_text(_SUDO.format(free=folder / "free", password=folder / "password"))
        sudo.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.know(self.host_key)
        threading.Thread(target=self._accept, daemon=True).start()

    def know(self, key: Any) -> None:
        """Make this the key by which clients know the server."""
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key.get_name()} {key.get_base64()}\n")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._socket.accept()
                with self.lock:
                    self.connections += 1
                    drop = self.to_drop > 0
                    self.to_drop -= drop
                if drop:
                    sock.close()  # as sshd does above MaxStartups: before its banner
                    continue
                transport = paramiko.Transport(sock)
                transport.add_server_key(self.host_key)
                self.transports.append(transport)
                session = _Session(self)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=session, event=threading.Event())
                threading.Thread(target=session.accept_tunnels, args=(transport,), daemon=True).start()

    def cut(self) -> None:
        """Every connection is lost."""
        for transport in self.transports:
            transport.sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for transport in self.transports:
            transport.close()

    # -- what a session does ---------------------------------------------------------------------------

    def count(self, change: int) -> None:
        with self.lock:
            self.sessions += change
            self.peak = max(self.peak, self.sessions)

    def serve(self, channel: Any, command: str) -> None:
        if command.endswith("docker system dial-stdio"):
            given, asks = b"", command.startswith("sudo -k")
            while asks and not given.endswith(b"\n") and (byte := channel.recv(1)):
                given += byte
            if not asks or given == (self.folder / "password").read_bytes():
                self._docker(channel)
        elif command == "hang":
            while not channel.closed:
                time.sleep(0.02)
        else:
            self._shell(channel, command)
        channel.close()

    def _shell(self, channel: Any, command: str) -> None:
        process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )
        assert process.stdin
        assert process.stdout
        assert process.stderr

        def feed(pipe: Any) -> None:
            with contextlib.suppress(OSError, EOFError):
                while data := channel.recv(65536):
                    pipe.write(data)
                    pipe.flush()
            with contextlib.suppress(OSError):
                pipe.close()

        def pump(pipe: Any, send: Any) -> None:
            with contextlib.suppress(OSError, EOFError):
                while data := pipe.read1(65536):
                    send(data)

        threading.Thread(target=feed, args=(process.stdin,), daemon=True).start()
        pumps = [
            threading.Thread(target=pump, args=(process.stdout, channel.sendall), daemon=True),
            threading.Thread(target=pump, args=(process.stderr, channel.sendall_stderr), daemon=True),
        ]
        for thread in pumps:
            thread.start()
        while process.poll() is None and not channel.closed:
            time.sleep(0.005)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for thread in pumps:
            thread.join(20)
        if process.returncode >= 0:  # of one that a signal ended, sshd tells no status
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                channel.send_exit_status(process.returncode)

    def _docker(self, channel: Any) -> None:
        """A Docker that knows its version."""
        seen = b""
        while data := channel.recv(65536):
            seen += data
            while b"\r\n\r\n" in seen:
                head, _, seen = seen.partition(b"\r\n\r\n")
                self.commands.append(head.split(b"\r\n")[0].decode())
                time.sleep(0.02)
                body = json.dumps({"ApiVersion": "1.45", "Version": "26.1.5"}).encode()
                channel.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                )


class _Session(paramiko.ServerInterface):  # type: ignore[misc]
    """One connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.open = 0
        self.tunnels: dict[int, socket.socket] = {}
        self.channels: list[Any] = []
        self.lock = threading.Lock()

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: Any) -> int:
        return int(paramiko.AUTH_SUCCESSFUL if key == self.server.user_key else paramiko.AUTH_FAILED)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        with self.lock:
            if self.open >= MAX_SESSIONS:
                return int(paramiko.OPEN_FAILED_RESOURCE_SHORTAGE)
            self.open += 1
        self.server.count(+1)
        return int(paramiko.OPEN_SUCCEEDED)

    def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
        if self.server.refuse_commands:
            return False
        self.server.commands.append(command.decode())

        def work() -> None:
            try:
                with contextlib.suppress(OSError, EOFError):  # the client went away
                    self.server.serve(channel, command.decode())
            finally:
                with contextlib.suppress(OSError, EOFError):
                    channel.close()
                with self.lock:
                    self.open -= 1
                self.server.count(-1)

        threading.Thread(target=work, daemon=True).start()
        return True

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: tuple[str, int]) -> int:
        try:
            sock = socket.create_connection(destination, timeout=2)
        except OSError:
            return int(paramiko.OPEN_FAILED_CONNECT_FAILED)
        self.server.commands.append(f"tunnel to port {destination[1]}")
        self.tunnels[chanid] = sock
        return int(paramiko.OPEN_SUCCEEDED)

    def accept_tunnels(self, transport: Any) -> None:
        while transport.is_active():
            channel = transport.accept(0.2)
            self.channels.append(channel)  # the transport itself holds them weakly
            if channel is not None and (sock := self.tunnels.pop(channel.get_id(), None)) is not None:
                threading.Thread(target=self._tunnel, args=(channel, sock), daemon=True).start()

    def _tunnel(self, channel: Any, sock: socket.socket) -> None:
        def outward() -> None:
            with contextlib.suppress(OSError, EOFError):
                while data := channel.recv(65536):
                    sock.sendall(data)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)

        threading.Thread(target=outward, daemon=True).start()
        with contextlib.suppress(OSError, EOFError):
            while data := sock.recv(65536):
                channel.sendall(data)
            channel.close()
        sock.close()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()
