"""An image archive without some layers is a valid archive with exactly the other members."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from swarmmail.cluster.images import _Archive
from swarmmail.model import content


def saved(layers: list[bytes]) -> bytes:
    """What ``docker save`` writes, small."""
    diffs = [f"sha256:{hashlib.sha256(str(n).encode() + data).hexdigest()}" for n, data in enumerate(layers)]
    config = json.dumps({"rootfs": {"diff_ids": diffs}}).encode()
    paths = [f"{'x' * 60}{n}/{'y' * 60}/layer.tar" for n in range(len(layers))]  # long: needs a header of its own
    manifest = json.dumps([{"Config": "config.json", "Layers": paths}]).encode()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [*zip(paths, layers, strict=True), ("config.json", config), ("manifest.json", manifest)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return whole.getvalue()


@given(st.data(), st.lists(st.binary(max_size=2000), min_size=1, max_size=6))
def test_any_layers_can_be_left_out(data: st.DataObject, layers: list[bytes]) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(saved(layers))
        file.flush()
        archive = _Archive(file)
        out = data.draw(st.sets(st.integers(0, len(layers) - 1)))
        size, stream = archive.pieces(tuple(archive.layers[n] for n in out))
        cut = b"".join(stream())
    assert len(cut) == size
    with tarfile.open(fileobj=io.BytesIO(cut)) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    kept = [n for n in range(len(layers)) if n not in out]
    assert set(found) == {"config.json", "manifest.json", *(f"{'x' * 60}{n}/{'y' * 60}/layer.tar" for n in kept)}
    assert all(found[f"{'x' * 60}{n}/{'y' * 60}/layer.tar"] == layers[n] for n in kept)


def test_a_folders_name_is_its_content(tmp_path: Path) -> None:
    def made(name: str, text: str = "text", mode: int = 0o644, file: str = "a/file") -> str:
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return content.of_folder(tmp_path / name)

    first = made("one")
    assert made("two") == first and len(first) == content.LENGTH
    assert len({first, made("three", "other"), made("four", mode=0o755), made("five", file="b/file")}) == 4


def test_the_borders_of_parts_count() -> None:
    assert content.digest(b"ab", b"c") != content.digest(b"a", b"bc")
