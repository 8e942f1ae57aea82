"""The lab's container driver where its Docker is slow: a stand-in for the client."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError

from swarmmail.lab.containers import ContainerDriver
from swarmmail.lab.naming import Naming


class Docker:
    """``late``: containers that are listed only after a while. Their volumes are there before, and in use."""

    def __init__(self, containers: list[str], late: list[str]) -> None:
        self.api = self
        self.base_url = "http+docker://localhost"
        self.there, self.late = containers, late
        self.disks = [f"volume-{name}" for name in [*containers, *late]]

    def ping(self) -> None: ...

    def containers(self, all: bool, filters: Any) -> list[dict[str, Any]]:
        return [
            {"Id": name, "Names": [f"/{name}"], "Mounts": [{"Name": f"volume-{name}"}, {"Type": "bind"}]}
            for name in self.there
        ]

    def remove_container(self, name: str, force: bool, v: bool) -> None:
        self.there.remove(name)

    def remove_volume(self, name: str) -> None:
        if name.removeprefix("volume-") in self.late:
            raise APIError("volume is in use", Response(409))
        self.disks.remove(name)

    def volumes(self, filters: Any) -> dict[str, Any]:
        """One of them; what Docker makes by itself has no label."""
        return {"Volumes": [{"Name": name} for name in self.disks if name == "volume-host2"] or None}

    def networks(self, filters: Any) -> list[dict[str, Any]]:
        return []

    def wait(self, seconds: float) -> None:
        self.there, self.late = self.there + self.late, []


@dataclass
class Response:
    status_code: int
    reason: str = "Conflict"
    url: str = ""


@pytest.mark.parametrize("late", [[], ["host3"], ["host2", "host3"]])
def test_down_also_removes_what_a_killed_up_had_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: list[str]
) -> None:
    engine = Docker(["router"], list(late))
    monkeypatch.setattr(docker, "from_env", lambda: engine)
    monkeypatch.setattr(time, "sleep", engine.wait)
    removed = ContainerDriver(Naming.of(tmp_path)).remove()
    assert sorted(removed) == sorted(
        f"{kind}{name}" for name in ["router", *late] for kind in ("container ", "volume volume-")
    )
    assert (engine.there, engine.disks) == ([], [])
