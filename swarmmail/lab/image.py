"""The image that lab hosts are started from: built from the recipe in ``image/``, only when it changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import resources
from typing import Any

import docker
from docker.errors import APIError, BuildError, DockerException, ImageNotFound

from swarmmail import report
from swarmmail.lab.naming import Variant
from swarmmail.model.errors import SwarmmailError

BASE = "debian:trixie-slim"
REPOSITORY = "swarmmail-lab"
_PULL_SILENCE = 20  # seconds without a byte until a registry counts as not reachable


def recipe() -> dict[str, bytes]:
    """The files of the recipe, by name."""
    return {
        entry.name: entry.read_bytes()
        for entry in sorted(resources.files("swarmmail.lab").joinpath("image").iterdir(), key=lambda e: e.name)
        if entry.is_file()
    }


def tag(files: dict[str, bytes], variant: Variant) -> str:
    """``swarmmail-lab/VARIANT:HASH``: another recipe is another image, never a ``latest``."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"{REPOSITORY}/{variant}:{digest.hexdigest()[:12]}"


def ensure(client: Any, variant: Variant) -> str:
    """Tag of the image, built now if the machine does not have it (about 20 s; the base image about 12 s)."""
    files = recipe()
    name = tag(files, variant)
    if not _has(client, BASE):  # the images of the stack are made of it, too
        _get_base(client)
    if not _has(client, name):
        report.progress(f"building {name}")
        _build(client, files, name, variant)
    return name


def remove_all(client: Any) -> list[str]:
    """Remove every image that recipes of ours made, but for those that another lab is running."""
    removed = []
    for image in client.images.list():
        for name in image.tags:
            if name.startswith(f"{REPOSITORY}/"):
                try:
                    client.images.remove(name)
                except APIError:  # 409: in use
                    continue
                removed.append(f"image {name}")
    return removed


def _has(client: Any, name: str) -> bool:
    try:
        client.images.get(name)
    except ImageNotFound:
        return False
    return True


def _build(client: Any, files: dict[str, bytes], name: str, variant: Variant) -> None:
    log: list[str] = []
    try:
        for event in client.api.build(
            fileobj=_archive(files),
            custom_context=True,
            tag=name,
            target=variant,
            labels={"swarmmail.lab.image": variant},
            rm=True,
            forcerm=True,
            decode=True,
        ):
            text = event.get("stream", "").strip()
            if text:
                log.append(text)
            if text.startswith("Step "):
                report.progress(text.splitlines()[0][:100])
            if "error" in event:
                raise BuildError(event["error"], iter(()))
    except DockerException as error:
        tail = "\n  ".join(log[-8:])
        raise SwarmmailError(f"{error}\n  {tail}", step=f"build {name}") from error


_SLIM = (
    *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "info", "lintian", "locale", "man")),
    "--dpkgopt=path-include=/usr/share/doc/*/copyright",
)
"""What the registry's ``-slim`` leaves out, also of what is installed later: two fifths of it."""


def _archive(files: dict[str, bytes]) -> io.BytesIO:
    """A build context in which times and owners do not matter, so that Docker's build cache works."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def _get_base(client: Any) -> None:
    """Pull the base image, or where no registry answers make it from Debian's signed packages."""
    report.progress(f"pulling {BASE}")
    repository, version = BASE.split(":")
    try:
        patient = docker.from_env(timeout=_PULL_SILENCE)
        for event in patient.api.pull(repository, version, stream=True, decode=True):
            if "error" in event:
                raise DockerException(event["error"])
        if _has(client, BASE):
            return
        why = "not there after the pull"
    except (DockerException, OSError) as error:
        why = str(error).splitlines()[0]
    if not shutil.which("mmdebstrap"):
        raise SwarmmailError(
            f"no image {BASE}, and it cannot be pulled ({why})",
            step="base image",
            hint="apt-get install mmdebstrap; then run this again, and it is made from Debian packages",
        )
    report.progress(f"cannot pull {BASE}; making it from Debian packages with mmdebstrap")
    command = ["mmdebstrap", "--variant=minbase", *_SLIM, "trixie", "-"]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as maker,
    ):
        assert maker.stdout is not None
        client.api.import_image_from_stream(_chunks(maker.stdout), repository, version, changes=['CMD ["bash"]'])
        status = maker.wait()
        complaints.seek(0)
        complaint = complaints.read().decode(errors="replace").strip()
    if status or not _has(client, BASE):
        _discard(client, BASE)  # an archive that was cut off makes an image all the same
        raise SwarmmailError(f"mmdebstrap ended with status {status}: {complaint[-600:]}", step="base image")


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(1 << 16):
        yield chunk


def _discard(client: Any, name: str) -> None:
    with contextlib.suppress(ImageNotFound):
        client.images.remove(name)
