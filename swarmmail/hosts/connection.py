"""One SSH connection a host: commands, forwarded ports and the Docker API all use it.

Fabric opens it (keys, agent, jump hosts, time limits). Two things are ours, because Fabric's own would not do:

- **Host keys.** Fabric accepts any key; here an unknown or changed key ends the task.
- **Commands.** Invoke feeds standard input one byte at a time and waits for the exit status without a limit
  (paramiko#1815). Here both streams are drained at once (no deadlock on large output, paramiko#1778), every
  command has a deadline, at our end *and* at the host's (``timeout(1)``), and what is secret goes in by
  standard input, never by an argument.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fabric
import paramiko
import tenacity
from paramiko.ssh_exception import NoValidConnectionsError

from swarmmail.model.errors import Deadline, HostError, SwarmmailError, Unreachable
from swarmmail.model.patience import patient

if TYPE_CHECKING:
    import docker

    from swarmmail.model import inventory

if not os.environ.get("SWARMMAIL_DEBUG"):
    # paramiko's thread logs a traceback for what reaches people as one line of ours
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)

SESSIONS_FOR_COMMANDS = 5
"""sshd's stock ``MaxSessions`` is 10 a connection (sshd_config(5)): five for commands, three for the API."""
REMEMBER_FAILURE = 60
"""Seconds: a host that did not answer is not waited for again by every step of the same command."""
KEEPALIVE = 15  # seconds: shorter than the idle limit of any router we have heard of


@dataclass(frozen=True)
class Result:
    """What a command left: exit status and both streams, as text."""

    status: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.status == 0


class _KnownKeyOnly(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    """Refuse a host whose key is not known, and say how to make it known."""

    def __init__(self, host: str, file: str) -> None:
        self.host, self.file = host, file

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
        raise Unreachable(
            f"host key is not known ({key.get_name()} SHA256:{digest}, file {self.file})",
            host=self.host,
            step="ssh",
            hint="compare the fingerprint with the host's own, then add it to that file (ssh-keyscan)",
        )


def _transient(error: BaseException) -> bool:
    """An sshd above ``MaxStartups`` drops connections before its banner: that heals by itself."""
    if isinstance(error, paramiko.AuthenticationException | paramiko.BadHostKeyException):
        return False
    return isinstance(error, ConnectionResetError | EOFError) or (
        isinstance(error, paramiko.SSHException) and "banner" in str(error)
    )


class Host:
    """A machine that is reached by SSH. Opened at the first use; safe to use from several threads."""

    def __init__(self, spec: inventory.Host, gateway: Host | None = None, sudo_password: str | None = None) -> None:
        self.spec = spec
        self.name = spec.name
        self._gateway = gateway
        self._sudo_password = sudo_password
        self._opening = threading.Lock()
        self._docker_opening = threading.Lock()
        self._docker: docker.APIClient | None = None
        self._sessions = threading.BoundedSemaphore(SESSIONS_FOR_COMMANDS)
        self._connection: fabric.Connection | None = None
        self._failed: tuple[float, Unreachable] | None = None
        self._sudo_asking = threading.Lock()
        self._sudo: tuple[str, bytes] | HostError | None = None

    # -- the connection ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, unless connected.

        Raises:
            Unreachable: no route, refused, time out, authentication, or the host key is not the known one.
        """
        with self._opening:
            if self._connection is not None and self._connection.is_connected:
                return
            if self._failed is not None and time.monotonic() - self._failed[0] < REMEMBER_FAILURE:
                raise self._failed[1]
            try:
                self._connection = self._opened()
            except Unreachable as error:
                self._failed = time.monotonic(), error
                raise

    def _opened(self) -> fabric.Connection:
        connection = self._new_connection()
        try:
            self._connect(connection)
        except SwarmmailError:
            raise
        except paramiko.BadHostKeyException as error:
            raise self._unreachable(
                f"host key has CHANGED (known: {error.expected_key.get_name()})",
                f"someone may be in between; if the host was installed anew, put its new key into {self._known_hosts}",
            ) from None
        except paramiko.AuthenticationException:
            raise self._unreachable(
                f"user {self.spec.user} was not let in with key {self.spec.key or 'of the agent'}",
                f"try: ssh {self._ssh_words}",
            ) from None
        except (paramiko.SSHException, OSError, EOFError) as error:
            reason = error.errors if isinstance(error, NoValidConnectionsError) else None
            text = str(next(iter(reason.values()))) if reason else str(error) or type(error).__name__
            if text in ("No existing session", "timed out") or "banner" in text:
                text = f"no answer from sshd within {self.spec.connect_timeout} s"
            raise self._unreachable(text, f"try: ssh {self._ssh_words}") from None
        transport = connection.transport
        transport.set_keepalive(KEEPALIVE)
        if isinstance(transport.sock, socket.socket):
            # a command is three small packets: with Nagle's algorithm each waits 40 ms for an acknowledgement
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _connect(self, connection: fabric.Connection) -> None:
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_transient),
            stop=tenacity.stop_after_delay(self.spec.connect_timeout),
            wait=tenacity.wait_random(0.1, 0.6),
            reraise=True,
        )
        retry(connection.open)

    def _new_connection(self) -> fabric.Connection:
        kwargs: dict[str, Any] = {
            "banner_timeout": self.spec.connect_timeout,
            "auth_timeout": self.spec.connect_timeout,
            "allow_agent": self.spec.key is None,
            "look_for_keys": self.spec.key is None,
        }
        if self.spec.key is not None:
            kwargs["pkey"] = self._private_key(self.spec.key)
        if self._gateway is not None:
            self._gateway.open()
        connection = fabric.Connection(
            host=self.spec.address,
            user=self.spec.user,
            port=self.spec.port,
            gateway=self._gateway._connection if self._gateway is not None else False,
            connect_timeout=self.spec.connect_timeout,
            connect_kwargs=kwargs,
            # The inventory says how a host is reached; a ProxyJump of ~/.ssh/config would bring in
            # connections whose host keys Fabric does not check.
            config=fabric.Config(lazy=True, overrides={"load_ssh_configs": False}),
        )
        client = connection.client
        try:
            client.load_host_keys(str(self._known_hosts))
        except FileNotFoundError:
            raise self._unreachable(
                f"no file {self._known_hosts}", f"make it: ssh-keyscan {self.spec.address}, then compare"
            ) from None
        client.set_missing_host_key_policy(_KnownKeyOnly(self.name, str(self._known_hosts)))
        return connection

    def _private_key(self, path: Path) -> paramiko.PKey:
        """The key itself: given a file name, paramiko tries it as every kind of key, and its last try hides why
        the server refused."""
        try:
            return paramiko.PKey.from_path(path)
        except paramiko.PasswordRequiredException:
            raise self._unreachable(
                f"key {path} has a passphrase", "ssh-add it, and leave 'key' out of the inventory"
            ) from None
        except (OSError, paramiko.SSHException, paramiko.UnknownKeyType, ValueError) as error:
            raise self._unreachable(f"key {path} can't be used ({error})", "name another key") from None

    @property
    def _known_hosts(self) -> Any:
        return self.spec.known_hosts

    @property
    def _ssh_words(self) -> str:
        key = f"-i {self.spec.key} " if self.spec.key else ""
        return f"{key}-p {self.spec.port} {self.spec.user}@{self.spec.address}"

    def _unreachable(self, what: str, hint: str) -> Unreachable:
        return Unreachable(what, host=self.name, step="ssh", hint=hint)

    @property
    def transport(self) -> paramiko.Transport:
        self.open()
        assert self._connection is not None
        transport: paramiko.Transport = self._connection.transport
        return transport

    def close(self) -> None:
        """Close the connection and what runs over it; never raises."""
        client, self._docker = self._docker, None
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                # paramiko's thread looks only every 0.1 s whether it shall end; a socket that has ended wakes it
                connection.transport.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Exception):
            if client is not None:
                client.close()
        with contextlib.suppress(Exception):
            if connection is not None:
                connection.close()

    # -- commands ---------------------------------------------------------------------------------------

    def run(
        self,
        command: str,
        *,
        stdin: str | bytes = b"",
        step: str = "command",
        timeout: float = 60,
        check: bool = True,
        root: bool = True,
    ) -> Result:
        """Run a shell command, as root unless told otherwise.

        Args:
            command: for ``sh``; it is visible in the host's process list, so it never holds a secret.
            stdin: sent to the command's standard input; secrets go here.
            step: what this is, for error messages.
            timeout: seconds, times the operator's patience; then the command is killed at the host and ``Deadline``
                raised.
            check: raise ``HostError`` when the exit status is not 0.
        """
        timeout = patient(timeout)
        prefix, password = self.as_root() if root else ("", b"")
        data = password + (stdin.encode() if isinstance(stdin, str) else stdin)
        wrapped = f"{prefix}timeout -k 5 {timeout:g} sh -c {shlex.quote(command)}"
        with self._sessions:
            result = self._exec(wrapped, data, step, timeout + 10)
        if result.status == 124:
            raise Deadline(f"took longer than {timeout:g} s and was ended", host=self.name, step=step)
        if check and not result.ok:
            raise HostError(_last_words(result), host=self.name, step=step)
        return result

    def _exec(self, command: str, stdin: bytes, step: str, timeout: float) -> Result:
        deadline = time.monotonic() + timeout
        streams: dict[str, list[bytes]] = {"out": [], "err": []}
        try:
            channel = self.transport.open_session(timeout=timeout)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostError(f"connection lost ({error})", host=self.name, step=step) from None
        with contextlib.closing(channel):
            channel.settimeout(timeout)
            try:
                channel.exec_command(command)
            except (paramiko.SSHException, EOFError, OSError) as error:
                raise HostError(f"the host runs no command ({error})", host=self.name, step=step) from None

            def drain(receive: Any, into: list[bytes]) -> None:
                with contextlib.suppress(socket.timeout, OSError, EOFError):
                    while chunk := receive(65536):
                        into.append(chunk)

            def feed() -> None:
                with contextlib.suppress(OSError, EOFError):
                    channel.sendall(stdin)
                    channel.shutdown_write()

            threads = [
                threading.Thread(target=drain, args=(channel.recv, streams["out"]), daemon=True),
                threading.Thread(target=drain, args=(channel.recv_stderr, streams["err"]), daemon=True),
            ]
            if len(stdin) > 16384:  # may not fit into the window: must not block the deadline
                threads.append(threading.Thread(target=feed, daemon=True))
            else:
                feed()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            if any(thread.is_alive() for thread in threads) or not channel.status_event.wait(
                max(0.1, deadline - time.monotonic())
            ):
                raise Deadline(f"no answer within {timeout:g} s", host=self.name, step=step)
            status = channel.recv_exit_status()
        if status == -1:  # none came: a signal ended the command (RFC 4254, 6.10), or there is no connection any more
            transport = channel.get_transport()
            transport.join(0.5)  # it closes its channels first, then ends
            what = "the command was killed there" if transport.is_alive() else "connection lost while the command ran"
            raise HostError(what, host=self.name, step=step)
        out, err = (b"".join(streams[name]).decode("utf-8", "replace") for name in ("out", "err"))
        return Result(status, out, err)

    def as_root(self) -> tuple[str, bytes]:
        """The words to put before a command, and the bytes to send before its input, to be root.

        ``sudo -S`` reads the password from standard input (sudo(8)). It is asked for only where
        ``sudo -n`` does not do without, since an unread password would reach the command instead.
        """
        if self.spec.user == "root":
            return "", b""
        with self._sudo_asking:  # once: a wrong password that is tried again and again locks the account
            if self._sudo is None:
                self._sudo = self._ask_sudo()
            if isinstance(self._sudo, HostError):
                raise self._sudo
            return self._sudo

    def _ask_sudo(self) -> tuple[str, bytes] | HostError:
        """The words and the password, or why not."""
        with self._sessions:
            free = self._exec("sudo -n true", b"", "sudo", 20)
        if free.ok:
            return "sudo -n -- ", b""
        if self._sudo_password is None:
            return HostError(
                f"user {self.spec.user} needs a password for sudo",
                host=self.name,
                step="sudo",
                hint="run again as: fab --prompt-for-sudo-password ...",
            )
        words = "sudo -k -S -p '' -- "
        secret = self._sudo_password.encode() + b"\n"
        with self._sessions:
            tried = self._exec(words + "true", secret, "sudo", 20)
        if not tried.ok:
            return HostError(
                f"sudo did not let user {self.spec.user} become root",
                host=self.name,
                step="sudo",
                hint="check the password, and the user's line in sudoers",
            )
        return words, secret

    def write(self, path: str, content: str | bytes, *, mode: str = "0644", step: str = "write file") -> None:
        """Write a file whole or not at all, also when the power goes: a new file beside it, on the disk before it is
        renamed. Without that a file is there after a power cut, and empty (rename(2) orders no data)."""
        quoted, new = shlex.quote(path), shlex.quote(path + ".swarmmail-new")
        self.run(
            f'd=$(dirname -- {quoted}) && mkdir -p "$d" && umask 077 && cat > {new} && chmod {mode} {new} && '
            f'sync {new} && mv {new} {quoted} && sync "$d"',
            stdin=content,
            step=step,
        )

    # -- other uses of the same connection --------------------------------------------------------------

    @property
    def docker(self) -> docker.APIClient:
        """The Docker API of this host, by this connection (see ``dockerapi``). Opened at the first use."""
        from swarmmail.hosts.dockerapi import client

        with self._docker_opening:
            if self._docker is None:
                self._docker = client(self)
            return self._docker

    def open_docker(self) -> None:
        """Begin to open the Docker API, beside other work: to start its client there and to agree on a version takes
        two round trips. A failure is left to show when the API is used."""

        def begin() -> None:
            with contextlib.suppress(Exception):
                self.docker  # noqa: B018

        threading.Thread(target=begin, daemon=True).start()

    @contextlib.contextmanager
    def forward(self, address: str, port: int) -> Iterator[int]:
        """Reach ``address:port`` as this host does; yields a port on the loopback of this machine.

        Not Fabric's ``forward_local``: it yields before its socket listens, and waits with ``select`` on a channel.
        For that paramiko makes a pipe, whose end it may close while its own thread writes there: the thread dies of
        EBADF, and the connection with it.
        """
        transport = self.transport
        opened: list[tuple[paramiko.Channel, socket.socket]] = []
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        sock, peer = server.accept()
                        try:
                            channel = transport.open_channel("direct-tcpip", (address, port), peer, timeout=15)
                        except (paramiko.SSHException, EOFError):
                            sock.close()  # nobody listens there: the client sees its connection end
                            continue
                        opened.append((channel, sock))
                        threading.Thread(target=_join, args=(channel, sock), daemon=True).start()

            threading.Thread(target=serve, daemon=True).start()
            try:
                yield server.getsockname()[1]
            finally:
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                for channel, sock in opened:
                    channel.close()
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def doing(self, step: str) -> Iterator[None]:
        """Turn what the Docker SDK or SSH raise into an error that names this host and the step."""
        import docker.errors
        import requests

        try:
            yield
        except docker.errors.APIError as error:
            raise HostError(str(error.explanation or error), host=self.name, step=step) from error
        except (docker.errors.DockerException, requests.RequestException) as error:
            if isinstance(error.__cause__, Unreachable):  # the SDK opens its connection with a question, by our SSH
                raise error.__cause__ from None
            raise HostError(
                f"Docker does not answer ({error})", host=self.name, step=step, hint="run: fab bootstrap"
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostError(f"connection lost ({error})", host=self.name, step=step) from error


def _join(channel: paramiko.Channel, sock: socket.socket) -> None:
    """Copy both ways until both have ended; an end is passed on, as TCP does."""

    def back() -> None:
        _copy(channel.recv, sock.sendall)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    other = threading.Thread(target=back, daemon=True)
    other.start()
    _copy(sock.recv, channel.sendall)
    with contextlib.suppress(OSError, EOFError):
        channel.shutdown_write()
    other.join()
    channel.close()
    sock.close()


def _copy(receive: Callable[[int], bytes], send: Callable[[bytes], object]) -> None:
    with contextlib.suppress(OSError, EOFError):
        while chunk := receive(65536):
            send(chunk)


def _last_words(result: Result) -> str:
    lines = [line for line in (result.stderr or result.stdout).strip().splitlines() if line.strip()]
    tail = lines[-1].strip() if lines else "no message"
    return f"exit status {result.status}: {tail}"
