"""The Docker SDK over the SSH connection that a host already has.

The SDK's own ``ssh://`` opens a second connection with host-key rules of its own and knows no jump host
(docker-py#2289). Its adapter is reused here with our transport, our limit on sessions, and root.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import docker
import tenacity
from docker.transport.basehttpadapter import BaseHTTPAdapter
from docker.transport.sshconn import SSHConnection, SSHConnectionPool

from swarmmail import report
from swarmmail.model.patience import patient

if TYPE_CHECKING:
    import requests

    from swarmmail.hosts.connection import Host

T = TypeVar("T")
SESSIONS = 3
"""API requests under way at once on one host (see ``connection.SESSIONS_FOR_COMMANDS``)."""
TIMEOUT = patient(60)  # seconds without a byte
ELECTION = patient(60)  # seconds that managers may take to elect a leader: seen to be 30
LEADERLESS = "does not have a leader"
"""What Docker says of a request that no manager could take: nothing was done."""
NO_LEADER = (LEADERLESS, "lost leader status", "context deadline exceeded")
"""The same, or the leader fell in the middle (the last: when a host came back), and what was asked for may be done
(moby/swarmkit, raft: ErrLostLeadership)."""
_waits = contextvars.ContextVar("_waits", default=True)


def _elects(text: str, words: tuple[str, ...] = NO_LEADER) -> bool:
    return any(one in text for one in words)


def patiently(act: Callable[[], T]) -> T:
    """While managers elect a leader the Swarm answers nothing; ``act`` is one that may be done again, also when nobody
    knows whether it counts. What only reads needs this not: the client waits for it (see ``_Client.request``)."""
    done: T = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _elects(str(error))),
        stop=tenacity.stop_after_delay(ELECTION),
        wait=tenacity.wait_fixed(0.5),
        before_sleep=say_it_once(ELECTION),
        reraise=True,
    )(act)
    return done


def say_it_once(seconds: float) -> Callable[[tenacity.RetryCallState], None]:
    """For ``before_sleep`` of who waits so many seconds for an election: people are told when it begins."""

    def say(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1:
            report.progress(f"no manager leads the Swarm; waiting {seconds:g} s at most for them to elect one")

    return say


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """In this block no request waits for an election: for who wants to know whether there is a leader."""
    token = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(token)


class _Connection(SSHConnection):  # type: ignore[misc]
    def __init__(self, host: Host) -> None:
        super().__init__(ssh_transport=host.transport, timeout=TIMEOUT)
        self._host = host

    def connect(self) -> None:
        words, password = self._host.as_root()
        sock = self._host.transport.open_session()
        sock.settimeout(TIMEOUT)
        sock.exec_command(f"{words}docker system dial-stdio")
        if password:
            sock.sendall(password)
        self.sock = sock

    @property
    def is_connected(self) -> bool:
        """Asked before a connection is used again. urllib3 would wait with ``select``, for which paramiko makes a
        pipe that it may close while its own thread writes there (see ``Host.forward``)."""
        return self.sock is not None and not (self.sock.closed or self.sock.eof_received or self.sock.recv_ready())


class _Pool(SSHConnectionPool):  # type: ignore[misc]
    def __init__(self, host: Host) -> None:
        super().__init__(timeout=TIMEOUT, maxsize=SESSIONS)
        self.block = True  # wait for a free session instead of opening one too many
        self._host = host

    def _new_conn(self) -> _Connection:
        return _Connection(self._host)

    def _get_conn(self, timeout: Any) -> _Connection:
        """The SDK's takes any connection again. One whose Docker was restarted is opened anew by the request."""
        connection: _Connection = super()._get_conn(timeout)
        if connection.sock is not None and not connection.is_connected:
            connection.close()
        return connection


class _Adapter(BaseHTTPAdapter):  # type: ignore[misc]
    def __init__(self, host: Host) -> None:
        self._pool = _Pool(host)
        super().__init__()

    def get_connection(self, url: str, proxies: Any = None) -> _Pool:
        return self._pool

    def get_connection_with_tls_context(
        self, request: Any, verify: Any, proxies: Any = None, cert: Any = None
    ) -> _Pool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


class _Client(docker.APIClient):  # type: ignore[misc]
    """An ``APIClient`` whose requests go by ``host``; the API version is negotiated with the engine."""

    def __init__(self, host: Host) -> None:
        super().__init__(base_url="tcp://localhost:2375", version="1.41", timeout=TIMEOUT)
        self._custom_adapter = _Adapter(host)
        self.mount("http+docker://ssh", self._custom_adapter)
        self.base_url = "http+docker://ssh"
        self._version = self._retrieve_server_version()

    def request(self, method: str, url: str, *args: Any, **options: Any) -> requests.Response:
        """A request that an election kept from being done is made again: a reading one always, a writing one when it
        is certain that nothing was written."""
        words = NO_LEADER if method.upper() == "GET" else (LEADERLESS,)
        answer: requests.Response = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda seen: seen.status_code >= 500 and _elects(seen.text, words)),
            stop=tenacity.stop_after_delay(ELECTION if _waits.get() else 0),
            wait=tenacity.wait_fixed(0.5),
            before_sleep=say_it_once(ELECTION),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )(super().request, method, url, *args, **options)
        return answer


def client(host: Host) -> docker.APIClient:
    """Raises ``docker.errors.DockerException`` when the engine does not answer."""
    return _Client(host)


def update(api: docker.APIClient, kind: str, raw: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """Write a whole specification (``kind``: configs, services), based on the version that was read as ``raw``.

    The SDK can't do it for configs, and resets what its call for services is not given. Done again it is refused.
    Raises ``docker.errors.APIError``: somebody else wrote in between, for example.
    """
    url = api._url("/{0}/{1}/update", kind, raw["ID"])
    api._raise_for_status(api._post_json(url, data=spec, params={"version": raw["Version"]["Index"]}))
