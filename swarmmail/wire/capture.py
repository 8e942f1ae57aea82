"""Captures on hosts, and the agent that speaks there: started, asked, stopped; nothing is left on a host."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from swarmmail.hosts.connection import Host
from swarmmail.model import printed
from swarmmail.model.errors import HostError
from swarmmail.model.facts import MESH
from swarmmail.model.patience import patient
from swarmmail.wire import state
from swarmmail.wire.state import State

LIMIT = patient(60)
"""Seconds after which a capture ends by itself, when nobody ends it."""
_SCRIPT = resources.files(__package__).joinpath("capture.sh").read_text().replace("@LINK@", MESH)
_AGENT = resources.files(__package__).joinpath("agent.py").read_text()
INSTALL = "apt-get install tcpdump python3-minimal"


@dataclass(frozen=True)
class Captured:
    """What a host captured."""

    underlay: bytes = b""
    """A pcap file of all links (LINUX_SLL2)."""
    inside: Mapping[int, bytes] = field(default_factory=dict)
    """The same of the UDP in each task's network namespace, by the task's process."""
    dropped: int = 0
    """Packets that the kernel could not hand over: with any, nothing can be said of what was not seen."""


def start(host: Host, words: str, overlay: str, processes: Sequence[int]) -> State:
    """Begin to capture, and read what is in force.

    Args:
        words: the filter (pcap-filter(7)).
        overlay: the network's id.
        processes: a process in each task's network namespace.
    """
    arguments = " ".join(map(shlex.quote, (f"{LIMIT:g}", words, overlay[:10], *map(str, processes))))
    result = host.run("sh -s", stdin=f"{_SCRIPT}\nstart {arguments}\n", step="capture", timeout=30, check=False)
    if result.status == 69:
        raise HostError(
            f"the host has {result.stderr.strip()}", host=host.name, step="capture", hint=f"on that host: {INSTALL}"
        )
    if not result.ok:
        raise HostError(result.stderr.strip() or "failed", host=host.name, step="capture")
    return state.parse(result.stdout)


def stop(host: Host, begun: State) -> Captured:
    """End the captures and fetch them."""
    result = host.run("sh -s", stdin=f"{_SCRIPT}\nstop {shlex.quote(begun.directory)}\n", step="capture", timeout=60)
    sections = printed.sections(result.stdout)
    files = {
        name.split()[1]: gzip.decompress(base64.b64decode(body))
        for name, body in sections.items()
        if name.startswith("capture ")
    }
    dropped = re.findall(r"(\d+) packets? dropped by kernel", "\n".join(sections.values()))
    return Captured(
        underlay=files.pop("underlay", b""),
        inside={int(name): data for name, data in files.items()},
        dropped=sum(map(int, dropped)),
    )


def ask(host: Host, jobs: Sequence[Mapping[str, Any]], process: int | None = None) -> list[dict[str, Any]]:
    """Let the agent do jobs (see ``agent.py``), in the network namespace of ``process`` or in the host's own."""
    enter = f"nsenter -t {process} -n " if process is not None else ""
    script = f"{_AGENT}\nTIMEOUT = {patient(4)}\nmain(json.loads({json.dumps(list(jobs))!r}))\n"
    result = host.run(f"{enter}python3 -", stdin=script, step="speak on the network", timeout=40)
    answers: list[dict[str, Any]] = json.loads(result.stdout)
    return answers
