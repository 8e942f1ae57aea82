"""What an eavesdropper on the network between the hosts sees while a mail crosses: a first form of the proof.

The control is the same capture, by the same means, without encryption: it must find what it looks for.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MAIL, STACK, Project

from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import probe
from swarmmail.model import inventory, stack

pytestmark = pytest.mark.lab


@dataclass
class Capture:
    file: Path

    def packets(self, words: str) -> int:
        listed = subprocess.run(
            ["tcpdump", "-nr", str(self.file), *words.split()], capture_output=True, text=True, check=True
        )
        return len(listed.stdout.splitlines())


@contextmanager
def captured(project: Project, folder: Path) -> Iterator[Capture]:
    """Everything that crosses the lab's bridge, but the operator's SSH."""
    capture = Capture(folder / "wire.pcap")
    words = [
        "tcpdump",
        "-i",
        project.bridge,
        "--immediate-mode",
        "-U",
        "-w",
        str(capture.file),
        "not",
        "tcp",
        "port",
        "22",
    ]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tcpdump:
        assert tcpdump.stderr is not None
        try:
            assert "listening on" in tcpdump.stderr.readline()
            yield capture
            time.sleep(0.5)  # what is under way
        finally:
            tcpdump.terminate()


def cross(project: Project, name: str, token: str) -> probe.Outcome:
    """A mail with this token, from its MTA to its MDA on another host."""
    loaded = inventory.load(project.root / "inventories" / f"{name}.yml")
    with Fleet(loaded) as fleet:
        outcome = probe.run(fleet, stack.read(loaded), token=token)
    assert outcome.mta != outcome.mda
    return outcome


def test_with_wireguard_neither_the_token_nor_vxlan_is_on_the_wire(deployed: Project, tmp_path: Path) -> None:
    token = "token-that-nobody-may-read-1"
    with captured(deployed, tmp_path) as capture:
        cross(deployed, MAIL, token)
    assert token.encode() not in capture.file.read_bytes()
    assert capture.packets("udp port 4789") == 0
    assert capture.packets("udp port 51820") > 10


def test_without_encryption_both_are_on_the_wire(fresh: Project, tmp_path: Path) -> None:
    token = "token-that-everybody-can-read"
    name = fresh.inventory("clear", stack=STACK, network={"encryption": "none"})
    result = fresh.fab("bootstrap", "deploy", env={"SWARMMAIL_INVENTORY": name}, timeout=300, check=0)
    assert "IN CLEAR TEXT" in result.stderr
    with captured(fresh, tmp_path) as capture:
        cross(fresh, name, token)
    assert token.encode() in capture.file.read_bytes()
    assert capture.packets("udp port 4789") > 10
