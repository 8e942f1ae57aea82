"""Names made of content: what changed gets a new name, what did not costs nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

LENGTH = 12
"""Hex digits of SHA-256: 48 bits tell apart what one team makes in its life."""


def digest(*parts: bytes) -> str:
    """A short hash of several pieces; their borders count."""
    total = hashlib.sha256()
    for part in parts:
        total.update(str(len(part)).encode() + b":" + part)
    return total.hexdigest()[:LENGTH]


def of_folder(folder: Path) -> str:
    """The hash of a build folder: every file's path, executable bit and bytes; times and owners do not count.

    Raises:
        OSError: a file can't be read.
    """
    parts: list[bytes] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        executable = b"x" if path.stat().st_mode & 0o100 else b"-"
        parts += [path.relative_to(folder).as_posix().encode(), executable, path.read_bytes()]
    return digest(*parts)
