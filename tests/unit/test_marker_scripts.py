"""The scripts that read and write markers as root, run for real on folders that stand for Docker's volumes. A container
may put anything into its volume, links too: none may lead these scripts to a file of the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from swarmmail.cluster.bootstrap import _REHOME
from swarmmail.hosts import facts as gathering
from swarmmail.mail.deploy import _MARK
from swarmmail.model.facts import Marker, parse

MARKER = "cluster=lab\nservice=mda\ngeneration=3\nnode=n1\nstate=live\n"
FACTS = Path(gathering.__file__).with_name("facts.sh").read_text()


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    (tmp_path / "volumes" / "mail" / "_data").mkdir(parents=True)
    (tmp_path / "secret").write_text("root:$6$secret\nnode=n1\nstate=live\n")
    return tmp_path / "volumes"


@pytest.fixture
def marker(volumes: Path) -> Path:
    return volumes / "mail" / "_data" / ".swarmmail-volume"


def sh(script: str, *words: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script, "sh", *words],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=20,
        check=False,
    )


def read(volumes: Path) -> str:
    """What the facts say of volumes."""
    part = FACTS[FACTS.index("s volumes") : FACTS.index("s end")].replace("/var/lib/docker", str(volumes.parent))
    lines = [line for line in part.splitlines() if not line.startswith("root=")]
    return sh("s() { printf '\\n@@%s\\n' \"$1\"; }\n" + "\n".join(lines), cwd=volumes).stdout


def tree(volumes: Path) -> list[str]:
    return sorted(str(path.relative_to(volumes)) for path in volumes.rglob("*"))


def test_a_marker_is_read(volumes: Path, marker: Path) -> None:
    marker.write_text(MARKER.rstrip("\n"))
    assert parse("h", read(volumes)).markers == (Marker("mail", "lab", "mda", 3, "n1", "live"),)


def test_a_link_is_no_marker_and_nothing_behind_it_is_read(volumes: Path, marker: Path) -> None:
    marker.symlink_to("../../../secret")
    assert marker.exists()
    assert read(volumes).split() == ["@@volumes"]


def test_a_pipe_is_no_marker_and_is_not_waited_for(volumes: Path, marker: Path) -> None:
    os.mkfifo(marker)
    assert read(volumes).split() == ["@@volumes"]


@pytest.mark.parametrize(
    "text", ["@@docker\n{}\n", "volume=other\n", "root:$6$secret\n", "\0\n" * 9 + "\n", "x" * 5000]
)
def test_a_marker_can_say_nothing_but_what_a_marker_says(volumes: Path, marker: Path, text: str) -> None:
    marker.write_text(text + MARKER)
    seen = read(volumes)
    assert set(seen.splitlines()) <= {"", "@@volumes", "volume=mail", *MARKER.splitlines()}
    assert [found.volume for found in parse("h", seen).markers] == ["mail"]


def test_a_marker_without_end_is_not_read_to_its_end(volumes: Path, marker: Path) -> None:
    marker.write_text("state=live\n" * 100_000)
    assert len(read(volumes)) < 5000


def test_a_new_id_is_told_to_the_markers_that_name_the_old_one(volumes: Path, marker: Path) -> None:
    marker.write_text(MARKER)
    other = volumes / "queue" / "_data" / ".swarmmail-volume"
    other.parent.mkdir(parents=True)
    other.write_text(MARKER.replace("n1", "n11"))
    before = tree(volumes)
    assert sh(_REHOME, "n1", "n2", cwd=volumes).returncode == 0
    assert marker.read_text() == MARKER.replace("node=n1", "node=n2")
    assert marker.stat().st_mode & 0o777 == 0o644
    assert "node=n11\n" in other.read_text()
    assert tree(volumes) == before


def test_a_new_id_is_not_told_by_a_link(volumes: Path, marker: Path) -> None:
    marker.symlink_to("../../../secret")
    assert sh(_REHOME, "n1", "n2", cwd=volumes).returncode == 0
    assert marker.is_symlink()
    assert "node=n1\n" in (volumes.parent / "secret").read_text()


def mark(volumes: Path) -> subprocess.CompletedProcess[str]:
    return sh(_MARK.replace("@OWN@", ":"), cwd=volumes / "mail" / "_data", stdin=MARKER)


def test_a_volume_gets_its_marker(volumes: Path, marker: Path) -> None:
    assert mark(volumes).returncode == 0
    assert (marker.read_text(), marker.stat().st_mode & 0o777) == (MARKER, 0o644)
    assert mark(volumes).returncode == 0
    assert tree(volumes) == ["mail", "mail/_data", "mail/_data/.swarmmail-volume"]


@pytest.mark.parametrize("name", [".swarmmail-volume", ".swarmmail-volume.new"])
@pytest.mark.parametrize("target", ["secret", "folder"])
def test_a_marker_is_not_written_by_a_link(volumes: Path, marker: Path, name: str, target: str) -> None:
    (volumes.parent / "folder").mkdir()
    (marker.parent / name).symlink_to(f"../../../{target}")
    before = (volumes.parent / "secret").read_text()
    assert mark(volumes).returncode == 0
    assert (marker.is_symlink(), marker.read_text()) == (False, MARKER)
    assert (volumes.parent / "secret").read_text() == before
    assert list((volumes.parent / "folder").iterdir()) == []


@pytest.mark.parametrize("linked", [False, True])
def test_a_volume_with_data_and_without_a_marker_is_somebody_s(volumes: Path, marker: Path, linked: bool) -> None:
    (marker.parent / "mailbox").mkdir()
    if linked:
        marker.symlink_to("../../../secret")
    result = mark(volumes)
    assert (result.returncode, result.stderr) == (3, "holds mailbox and has no marker\n")
    assert marker.is_symlink() == linked
