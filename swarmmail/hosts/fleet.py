"""All hosts of an inventory: opened once, used in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from swarmmail.hosts.connection import Host
from swarmmail.model import inventory
from swarmmail.model.errors import SwarmmailError

T = TypeVar("T")

PARALLEL = 16
"""Hosts at once: paramiko's cryptography is done by this machine, more threads would only wait for it."""


def _jump_host(spec: inventory.Host, jump: inventory.Jump) -> inventory.Host:
    """A jump host outside of the inventory: reached with the same key, its host key checked just the same."""
    place = {
        "name": jump.address,
        "address": jump.address,
        "user": jump.user,
        "port": jump.port,
        "jump": None,
    }
    return spec.model_copy(update=place)


class Fleet:
    """The hosts by name, in the inventory's order. A context manager: leaves no connection open."""

    def __init__(self, hosts: inventory.Inventory, sudo_password: str | None = None) -> None:
        self.inventory = hosts
        self._hosts: dict[str, Host] = {}
        gateways: dict[str, Host] = {}

        def make(spec: inventory.Host) -> Host:
            if spec.name not in self._hosts:
                gateway = None
                if spec.jump is not None and spec.jump.member is not None:
                    gateway = make(hosts.hosts[spec.jump.member])
                elif spec.jump is not None:
                    gateway = gateways.setdefault(str(spec.jump), Host(_jump_host(spec, spec.jump)))
                self._hosts[spec.name] = Host(spec, gateway, sudo_password)
            return self._hosts[spec.name]

        for spec in hosts.hosts.values():
            make(spec)
        self._gateways = list(gateways.values())

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return (self._hosts[name] for name in self.inventory.hosts)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for host in [*self._hosts.values(), *self._gateways]:
            host.close()

    def each(self, work: Callable[[Host], T], names: Iterable[str] | None = None) -> dict[str, T]:
        """Do ``work`` on several hosts (default: all) at once; results by name.

        Raises:
            SwarmmailError: of the first host that failed; when several did, one error that holds all lines.
        """
        chosen = [self._hosts[name] for name in (self.inventory.hosts if names is None else names)]
        if not chosen:
            return {}
        with ThreadPoolExecutor(max_workers=min(PARALLEL, len(chosen))) as pool:
            futures = {host.name: pool.submit(work, host) for host in chosen}
        errors = [e for f in futures.values() if (e := f.exception()) is not None]
        for error in errors:
            if not isinstance(error, SwarmmailError):
                raise error
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise SwarmmailError("\n".join(str(error) for error in errors))
        return {name: future.result() for name, future in futures.items()}
