"""Images on their way: archives without some layers, and loads that are cut short."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from swarmmail.cluster import images
from swarmmail.cluster.images import _Archive
from swarmmail.hosts.connection import Host
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


# ---- power cuts ----

TAG = "swarmmail/mda:1"


class PowerCut(Exception):
    """The host is off; what was not on its disk is lost."""


class Engine:
    """A host and its Docker, which takes a layer that is there for whole, and does not wait for the disk (seen: after a
    power cut right after a load 678 of the image's files were empty)."""

    name = "host2"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "docker"
        self.folder.mkdir()
        self.sync = folder / "sync"
        self.written: dict[str, bool] = {}
        """Layers: whether the disk has it. One that is there and was not written when the power went is empty."""
        self.empty: set[str] = set()
        self.stored: dict[str, tuple[str, ...]] = {}
        self.names: dict[str, str] = {}
        self.names_on_disk: dict[str, str] = {}
        self.left = -1
        """Steps until the power goes; negative: it stays."""

    @property
    def docker(self) -> Engine:
        return self

    def _step(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def power_is_back(self, names_lost: bool) -> None:
        self.empty |= {layer for layer, written in self.written.items() if not written}
        self.written = dict.fromkeys(self.written, True)
        self.names = dict(self.names_on_disk if names_lost else self.names)
        self.left = -1

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        yield

    def run(self, command: str, **options: object) -> SimpleNamespace:
        """A shell whose Docker has its folder at ``self.folder``; ``sync -f`` is noted."""
        self._step()
        self.sync.unlink(missing_ok=True)
        path = f"sync() {{ [ $1 != -f ] || : >{self.sync}; }}\n"
        done = subprocess.run(["sh", "-c", path + command], capture_output=True, text=True, check=True)
        if self.sync.exists():
            self.written = dict.fromkeys(self.written, True)
            self.names_on_disk = dict(self.names)
        return SimpleNamespace(stdout=done.stdout)

    def info(self) -> dict[str, str]:
        return {"DockerRootDir": str(self.folder)}

    def images(self, filters: Mapping[str, bool]) -> list[dict[str, Any]]:
        named = set(self.names.values())
        return [
            {"Id": one, "Labels": {images.LABEL: "swarmmail/mda"}}
            for one in self.stored
            if (one not in named) == filters["dangling"]
        ]

    def inspect_image(self, image: str) -> dict[str, Any]:
        tags = [tag for tag, one in self.names.items() if one == image]
        return {"RootFS": {"Layers": list(self.stored[image])}, "RepoTags": tags}

    def remove_image(self, image: str) -> None:
        self._step()
        del self.stored[image]
        kept = {layer for layers in self.stored.values() for layer in layers}
        self.written = {layer: written for layer, written in self.written.items() if layer in kept}
        self.empty &= kept

    def load_image(self, data: Iterable[bytes]) -> list[dict[str, str]]:
        with tarfile.open(fileobj=io.BytesIO(b"".join(data))) as tar:
            sent = set(tar.getnames())
            manifest = json.load(tar.extractfile("manifest.json"))[0]  # type: ignore[arg-type]
            layers = json.load(tar.extractfile("config.json"))["rootfs"]["diff_ids"]  # type: ignore[arg-type]
        for layer, path in zip(layers, manifest["Layers"], strict=True):
            self._step()
            assert layer in self.written or path in sent, "it was left out, and is not there"
            self.written.setdefault(layer, False)
        self._step()
        image = "sha256:" + hashlib.sha256(json.dumps(layers).encode()).hexdigest()
        self.stored[image] = tuple(layers)
        return [{"stream": f"Loaded image ID: {image}\n"}]

    def tag(self, image: str, name: str, tag: str) -> None:
        self._step()
        self.names[f"{name}:{tag}"] = image

    def whole(self, tag: str) -> bool:
        return not self.empty & set(self.stored[self.names[tag]])


def archive_of(file: Any, *layers: bytes) -> _Archive:
    file.write(saved(list(layers)))
    file.flush()
    return _Archive(file)


@given(st.lists(st.tuples(st.integers(0, 16), st.booleans(), st.booleans()), max_size=4))
def test_an_image_that_has_its_name_is_whole_whenever_the_power_goes(cuts: list[tuple[int, bool, bool]]) -> None:
    """Cuts: after how many steps; whether the names that were not on the disk are lost; which of two images with one
    layer in common was on its way."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        engine = Engine(Path(folder))
        archives = {TAG: archive_of(one, b"base", b"first"), "swarmmail/mda:2": archive_of(other, b"base", b"second")}
        for steps, names_lost, second in cuts:
            tag = "swarmmail/mda:2" if second else TAG
            engine.left = steps
            with contextlib.suppress(PowerCut):
                images._ship_to(cast(Host, engine), archives[tag], tag)
            engine.power_is_back(names_lost)
            assert all(engine.whole(tag) for tag in engine.names)
        for tag in archives:
            images._ship_to(cast(Host, engine), archives[tag], tag)
            engine.power_is_back(names_lost=True)
            assert engine.whole(tag)
