"""Images: built once, brought to the hosts that need them, by SSH and without a registry.

``docker save`` is read once into a file; each host gets a copy of that archive in which the layers that it has
already are left out. ``docker load`` looks a layer up by the hash of its chain before it opens its file
(moby, ``image/tarexport/load.go``), so it takes such an archive; an engine that does not (the containerd image
store) gets the whole one.

Docker does not wait until the files of a layer are on the disk: after a power cut an image is there whose programs are
empty, and neither another load nor another pull mends it, as its layers are there (moby/moby#49784). So an image
arrives without a name, and gets it last: **an image that has its name is whole**.

See ``docs/adr/0002-images-by-save-and-load.md`` for why this and not a registry.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import docker
import docker.errors
import docker.utils

from swarmmail import report
from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import content
from swarmmail.model.errors import HostError, SwarmmailError

LABEL = "swarmmail.image"
BUILD_TIMEOUT = 1200  # seconds without a line of output
FLUSH_TIMEOUT = 600  # seconds: a slow disk may have much else to write
CHUNK = 1 << 18


@dataclass(frozen=True)
class ImageInfo:
    """What is needed of an image that exists somewhere."""

    id: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Builder:
    """Where images are built: Docker of this machine, or of a host."""

    api: docker.APIClient
    name: str
    host: Host | None = None
    """None for this machine."""


def builder(fleet: Fleet, where: str) -> Builder:
    """Raises SwarmmailError when this machine's Docker does not answer."""
    if where != "local":
        with fleet[where].doing("build images"):
            return Builder(fleet[where].docker, where, fleet[where])
    try:
        return Builder(docker.from_env(timeout=BUILD_TIMEOUT).api, "this machine")
    except docker.errors.DockerException as error:
        raise SwarmmailError(
            f"Docker of this machine does not answer ({error})",
            step="build images",
            hint="start it, or name a host in stack.build",
        ) from None


def inspect(api: docker.APIClient, tag: str) -> ImageInfo | None:
    """The image that ``tag`` names there; None when there is none."""
    try:
        raw = api.inspect_image(tag)
    except docker.errors.ImageNotFound:
        return None
    config = raw.get("Config") or {}
    return ImageInfo(
        id=raw["Id"],
        entrypoint=tuple(config.get("Entrypoint") or ()),
        command=tuple(config.get("Cmd") or ()),
        layers=tuple((raw.get("RootFS") or {}).get("Layers") or ()),
    )


def build(where: Builder, folder: Path, tag: str) -> ImageInfo:
    """Build a folder with the classic builder of the API. Raises SwarmmailError with the builder's last words."""
    started = time.monotonic()
    report.progress(f"build {tag}", where.name)
    _need_base(where, folder)
    last = ""
    try:
        stream = where.api.build(
            path=str(folder), tag=tag, rm=True, forcerm=True, decode=True, labels={LABEL: tag.split(":")[0]}
        )
        for line in stream:
            if "error" in line:
                raise SwarmmailError(
                    f"{line['error'].strip()} ({last})" if last else line["error"].strip(),
                    host=where.name,
                    step=f"build {folder.name}",
                    hint=f"see {folder / 'Dockerfile'}",
                )
            text = line.get("stream", "").strip()
            last = last if not text or text.startswith(("--->", "Removing intermediate")) else text
    except (docker.errors.DockerException, OSError) as error:
        raise SwarmmailError(str(error), host=where.name, step=f"build {folder.name}") from error
    built = inspect(where.api, tag)
    if built is None:
        raise SwarmmailError(f"{tag} is not there after the build", host=where.name, step="build")
    if where.host is not None:
        _Store(where.host).flush()
    report.progress(f"built {tag} in {time.monotonic() - started:.1f} s", where.name)
    return built


def _need_base(where: Builder, folder: Path) -> None:
    """The base must be there or be pulled. A builder without a registry may get it from this machine."""
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    stages = set(re.findall(r"(?im)^FROM\s+\S+\s+AS\s+(\S+)", text))
    for base in re.findall(r"(?im)^FROM\s+(?:--\S+\s+)*(\S+)", text):
        if base in stages or base == "scratch" or inspect(where.api, base) is not None:
            continue
        if where.name != "this machine" and _local_has(base):
            local = docker.from_env().api
            with _archive(local, base) as archive:
                _send(where.api, where.name, archive, ())
            continue
        try:
            name, _, tag = base.partition(":")
            where.api.pull(name, tag=tag or "latest")
        except docker.errors.DockerException:
            raise SwarmmailError(
                f"base image {base} is not there and can't be pulled",
                host=where.name,
                step=f"build {folder.name}",
                hint=f"make it there: mmdebstrap --variant=minbase trixie - | docker import - {base}",
            ) from None


def _local_has(tag: str) -> bool:
    try:
        return inspect(docker.from_env().api, tag) is not None
    except docker.errors.DockerException:
        return False


class _Archive:
    """A ``docker save`` archive in a temporary file, of which a part can be streamed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            self._members = tar.getmembers()
            manifest = tar.extractfile("manifest.json")
            if manifest is None:
                raise SwarmmailError("the archive of docker save has no manifest.json", step="ship images")
            entry = json.load(manifest)[0]
            config = tar.extractfile(entry["Config"])
            if config is None:
                raise SwarmmailError("the archive of docker save has no configuration", step="ship images")
            diffs = json.load(config)["rootfs"]["diff_ids"]
        self.layers: tuple[str, ...] = tuple(diffs)
        self._path_of = dict(zip(diffs, entry["Layers"], strict=True))

    def pieces(self, leave_out: tuple[str, ...]) -> tuple[int, Callable[[], Iterator[bytes]]]:
        """Size in bytes, and the archive itself, without these layers."""
        skip = {self._path_of[layer] for layer in leave_out}
        spans: list[tuple[int, int]] = []
        ends = [member.offset for member in self._members[1:]] + [self._end()]
        for member, end in zip(self._members, ends, strict=True):
            if member.name not in skip:
                spans.append((member.offset, end))
        size = sum(end - start for start, end in spans) + 1024

        def stream() -> Iterator[bytes]:
            descriptor = self.file.fileno()
            for start, end in spans:
                while start < end:
                    data = os.pread(descriptor, min(CHUNK, end - start), start)  # several hosts read at once
                    if not data:
                        raise SwarmmailError("the archive of docker save is cut short", step="ship images")
                    start += len(data)
                    yield data
            yield b"\0" * 1024  # two empty blocks end an archive (tar(5))

        return size, stream

    def _end(self) -> int:
        last = self._members[-1]
        return last.offset_data + -(-last.size // 512) * 512 if last.isreg() else last.offset_data


@contextlib.contextmanager
def _archive(api: docker.APIClient, image: str) -> Iterator[_Archive]:
    """``image``: a name, which the archive then holds, too, or an id."""
    with tempfile.TemporaryFile(prefix="swarmmail-image-") as file:
        for chunk in api.get_image(image, chunk_size=CHUNK):
            file.write(chunk)
        file.flush()
        yield _Archive(file)


def ship(fleet: Fleet, where: Builder, wanted: Mapping[str, Iterable[str]]) -> None:
    """Bring images to hosts. ``wanted``: tag to the hosts that lack it.

    All hosts at once; the images of one host one after the other, so that layers which they share go over once.
    """
    by_host: dict[str, list[str]] = {}
    for tag, hosts in wanted.items():
        for host in hosts:
            by_host.setdefault(host, []).append(tag)
    with contextlib.ExitStack() as stack:

        def saved(tag: str) -> _Archive:
            return stack.enter_context(_archive(where.api, where.api.inspect_image(tag)["Id"]))

        try:
            with ThreadPoolExecutor() as pool:
                opened = pool.map(saved, wanted)
                archives = dict(zip(wanted, opened, strict=True))
        except docker.errors.DockerException as error:
            raise SwarmmailError(str(error), host=where.name, step="docker save") from error

        def serve(host: Host) -> None:
            for tag in by_host[host.name]:
                _ship_to(host, archives[tag], tag)

        fleet.each(serve, by_host)


def prune(host: Host, tag: str, keep: int = 2) -> None:
    """Remove older images of the same name that we built, but for the newest ``keep`` (a way back)."""
    with host.doing("remove old images"):
        found = host.docker.images(filters={"label": f"{LABEL}={tag.rpartition(':')[0]}"})
        found.sort(key=lambda raw: tag not in (raw.get("RepoTags") or ()))  # stable: the newest first, after ours
        for raw in found[keep:]:
            for old in raw.get("RepoTags") or ():
                with contextlib.suppress(docker.errors.APIError):  # in use: the engine itself refuses
                    host.docker.remove_image(old)


def _ship_to(host: Host, archive: _Archive, tag: str) -> None:
    with host.doing(f"load {tag}"):
        store = _Store(host)
        mark = content.digest("\n".join(archive.layers).encode())
        was_cut = store.begin(mark)
        _remove_leftovers(host.docker, archive.layers)
        image = _load(host, archive)
        if was_cut and not host.docker.inspect_image(image)["RepoTags"]:
            # Layers that no image had are its now. They go with it, and come again.
            host.docker.remove_image(image)
            image = _load(host, archive)
        store.flush()
        host.docker.tag(image, *docker.utils.parse_repository_tag(tag))
        store.end(mark)


class _Store:
    """Where a host's Docker keeps images, and a mark there for each that is being loaded: a load that was cut short may
    have left layers without an image, of which the API shows nothing, and which another image may have, too."""

    def __init__(self, host: Host) -> None:
        self.host = host
        with host.doing("read Docker's folder"):
            self.folder = shlex.quote(host.docker.info()["DockerRootDir"])
        self.mark = f"{self.folder}/swarmmail-load-"

    def begin(self, mark: str) -> bool:
        """Whether a load had begun before, of whatever image, and did not end."""
        script = f"ls {self.mark}* 2>/dev/null | head -1; : >{self.mark}{mark} && sync {self.mark}{mark} {self.folder}"
        return self._run(script) != ""

    def flush(self, then: str = ":") -> None:
        """Wait until all is on the disk. The containerd image store is not in Docker's folder."""
        self._run(f"for d in {self.folder} /var/lib/containerd; do [ ! -d $d ] || sync -f $d || exit 1; done; {then}")

    def end(self, mark: str) -> None:
        self.flush(f"rm -f {self.mark}{mark}")

    def _run(self, script: str) -> str:
        return self.host.run(script, step="write the image to the disk", timeout=FLUSH_TIMEOUT).stdout


def _load(host: Host, archive: _Archive) -> str:
    """Load what the host lacks of an image; its id there. Layers of an image without a name count as lacking."""
    there = _shared(host.docker, archive.layers)
    try:
        return _send(host.docker, host.name, archive, there)
    except HostError:
        if not there:
            raise
        report.progress("does not take a part of an image: the whole one is sent", host.name)
        return _send(host.docker, host.name, archive, ())


def _remove_leftovers(api: docker.APIClient, layers: tuple[str, ...]) -> None:
    """Remove what loads have left that were cut short: images of ours that have no name, or this very one. A later load
    would take their layers for whole."""
    for image in api.images(filters={"dangling": True}):
        if LABEL in (image.get("Labels") or {}) or _layers(api, image["Id"]) == layers:
            with contextlib.suppress(docker.errors.APIError):  # in use: so it works
                api.remove_image(image["Id"])


def _layers(api: docker.APIClient, image: str) -> tuple[str, ...]:
    return tuple((api.inspect_image(image).get("RootFS") or {}).get("Layers") or ())


def _shared(api: docker.APIClient, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The longest beginning of ``layers`` with which an image that has a name there begins too."""
    best = 0
    for image in api.images(filters={"dangling": False}):
        same = 0
        for ours, theirs in zip(layers, _layers(api, image["Id"]), strict=False):
            if ours != theirs:
                break
            same += 1
        best = max(best, same)
    return layers[:best]


def _send(api: docker.APIClient, name: str, archive: _Archive, leave_out: tuple[str, ...]) -> str:
    """The loaded image's id there, or its name when the archive holds one."""
    size, stream = archive.pieces(leave_out)
    spared = archive.size - size
    note = f" ({spared / 1e6:.0f} MB are there already)" if leave_out else ""
    with report.transfer(f"image{note}", size, name) as sent:

        def counted() -> Iterator[bytes]:
            for piece in stream():
                sent(len(piece))
                yield piece

        try:
            lines: list[dict[str, Any]] = list(api.load_image(counted()) or ())
            problem = next((line["error"] for line in lines if "error" in line), None)
        except docker.errors.APIError as error:
            problem = str(error.explanation or error)
    if problem:
        raise HostError(problem, host=name, step="load image")
    text = "".join(line.get("stream", "") for line in lines)
    loaded = re.search(r"^Loaded image(?: ID)?: (\S+)$", text, re.MULTILINE)
    if loaded is None:
        raise HostError(f"docker load names no image: {text.strip() or 'no answer'}", host=name, step="load image")
    return loaded[1]
