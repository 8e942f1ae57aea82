"""What a check found: plain data, its order, its exit status. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """``note``: worth knowing, or not measured; never changes the exit status."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    level: Level
    where: str
    """A host, a pair ``a -> b``, or ``inventory``."""
    what: str
    measured: str
    why: str = ""
    """Why it matters, in one line."""
    mend: str = ""
    """The command that mends it, for a root shell on the host ``on``."""
    on: str = ""
    """Empty: for the operator to do, not on a host."""

    @property
    def document(self) -> dict[str, Any]:
        return {**asdict(self), "level": str(self.level)}


def ok(where: str, what: str, measured: str) -> Finding:
    return Finding(Level.OK, where, what, measured)


def note(where: str, what: str, measured: str, why: str = "", mend: str = "") -> Finding:
    return Finding(Level.NOTE, where, what, measured, why, mend)


def warning(where: str, what: str, measured: str, why: str, mend: str, on: str | None = None) -> Finding:
    return Finding(Level.WARNING, where, what, measured, why, mend, where if on is None else on)


def error(where: str, what: str, measured: str, why: str, mend: str, on: str | None = None) -> Finding:
    return Finding(Level.ERROR, where, what, measured, why, mend, where if on is None else on)


def count(findings: Iterable[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)


def status(findings: Iterable[Finding], strict: bool = False) -> int:
    """Exit status: 2 with an error, 1 with a warning when ``strict``, else 0."""
    levels = {finding.level for finding in findings}
    if Level.ERROR in levels:
        return 2
    return 1 if strict and Level.WARNING in levels else 0


def document(findings: list[Finding], strict: bool = False) -> dict[str, Any]:
    return {
        "status": status(findings, strict),
        "counts": {str(level): count(findings, level) for level in Level},
        "findings": [finding.document for finding in findings],
    }
