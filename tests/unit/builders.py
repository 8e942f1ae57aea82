"""Inventories and facts for the tests of the model, in one line each."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from swarmmail.model import inventory
from swarmmail.model.facts import HostFacts
from swarmmail.model.inventory import Inventory

PROGRAMS = frozenset({"docker", "dockerd", "wg", "wg-quick", "wireguard-go", "nft", "iptables"})


def address(number: int) -> str:
    """The underlay address of host ``number``."""
    return f"198.18.0.{10 + number}"


@functools.lru_cache(maxsize=512)
def _load(text: str) -> Inventory:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.yml"
        path.write_text(text)
        return inventory.load(path)


def make_inventory(roles: str = "mmm", *, hosts: dict[str, dict[str, Any]] | None = None, **network: Any) -> Inventory:
    """An inventory of host1, host2, ...: one letter a host, ``m`` or ``w``. ``hosts`` adds keys to some of them,
    the other arguments are the section ``network``."""
    entries = {
        f"host{i}": {"address": address(i), "role": {"m": "manager", "w": "worker"}[role]}
        | (hosts or {}).get(f"host{i}", {})
        for i, role in enumerate(roles, 1)
    }
    text = _Text()
    YAML(typ="safe").dump({"cluster": "lab", "hosts": entries, "network": network}, text)
    return _load(text.value)


class _Text:
    def __init__(self) -> None:
        self.value = ""

    def write(self, data: bytes) -> None:
        self.value += data.decode()


def make_facts(name: str = "host1", **changes: Any) -> HostFacts:
    """A Debian host with everything installed and Docker running, in no Swarm."""
    number = int(name[-1])
    values: dict[str, Any] = {
        "os": "debian",
        "os_name": "Debian GNU/Linux 13 (trixie)",
        "systemd": True,
        "hostname": name,
        "programs": PROGRAMS,
        "engine": "26.1.5",
        "addresses": {"lo": ("127.0.0.1",), "eth0": (address(number),)},
        "mtus": {"lo": 65536, "eth0": 1500},
        "units": {"docker": ("active", "enabled")},
        "esp": True,
        "tun": True,
    }
    return HostFacts(name=name, **values | changes)
