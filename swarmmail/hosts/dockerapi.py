"""The Docker SDK over the SSH connection that a host already has.

The SDK's own ``ssh://`` opens a second connection with host-key rules of its own and knows no jump host
(docker-py#2289). Its adapter is reused here with our transport, our limit on sessions, and root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import docker
from docker.transport.basehttpadapter import BaseHTTPAdapter
from docker.transport.sshconn import SSHConnection, SSHConnectionPool

from swarmmail.model.patience import patient

if TYPE_CHECKING:
    from swarmmail.hosts.connection import Host

SESSIONS = 3
"""API requests under way at once on one host (see ``connection.SESSIONS_FOR_COMMANDS``)."""
TIMEOUT = patient(60)  # seconds without a byte


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


def client(host: Host) -> docker.APIClient:
    """Raises ``docker.errors.DockerException`` when the engine does not answer."""
    return _Client(host)


def update(api: docker.APIClient, kind: str, raw: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """Write a whole specification (``kind``: configs, services), based on the version that was read as ``raw``.

    The SDK can't do it for configs, and resets what its call for services is not given.
    Raises ``docker.errors.APIError``: somebody else wrote in between, for example.
    """
    url = api._url("/{0}/{1}/update", kind, raw["ID"])
    api._raise_for_status(api._post_json(url, data=spec, params={"version": raw["Version"]["Index"]}))
