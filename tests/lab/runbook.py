"""Reads a runbook and executes it; how one is written: ``docs/runbooks/README.md``.

Nothing in here knows pytest, the lab or swarmmail: who executes says what a prompt leads to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

SECTIONS = ("Symptom", "Check", "Act", "Prove", "Undo")
OPERATOR = ""
"""The machine that a prompt without a host name is on: the operator's own."""

_FENCE = re.compile(r"```(\S*)\s*$")
_PROMPT = re.compile(r"(?:([a-z0-9-]+(?:, [a-z0-9-]+)*))?\$ (.+)")
_FILE = re.compile(r"(?:#|---|\+\+\+) (\S+/\S+)\s*$")


class RunbookError(AssertionError):
    """A page that cannot be read, or that does not show what is."""


@dataclass(frozen=True)
class Command:
    """A command, where to run it, and what the page shows of its output."""

    line: int
    hosts: tuple[str, ...]
    words: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """A file that the page shows whole."""

    line: int
    path: str
    text: str


@dataclass(frozen=True)
class Changed:
    """A change of a file: lines that are there once, and what takes their place."""

    line: int
    path: str
    old: str
    new: str


Step: TypeAlias = Command | Written | Changed


@dataclass(frozen=True)
class Page:
    name: str
    sections: tuple[str, ...]
    steps: tuple[Step, ...]


# ---- reading ----


def read(path: Path) -> Page:
    return parse(path.read_text(), path.name)


def parse(text: str, name: str = "page") -> Page:
    """Raises RunbookError with page and line: a block of a kind that nobody executes, or one that is empty."""
    sections: list[str] = []
    steps: list[Step] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence is None:
            if "```" in lines[at]:
                raise RunbookError(f"{name}:{at + 1}: a fence begins its line and has one word after it: {lines[at]}")
            if lines[at].startswith("## "):
                sections.append(lines[at][3:].strip())
            at += 1
            continue
        first = at + 1
        end = next((n for n in range(first, len(lines)) if lines[n].rstrip() == "```"), None)
        if end is None:
            raise RunbookError(f"{name}:{at + 1}: this block does not end")
        steps += _block(fence[1], lines[first:end], name, first + 1)
        at = end + 1
    return Page(name, tuple(sections), tuple(steps))


def _block(kind: str, lines: list[str], name: str, line: int) -> list[Step]:
    if kind == "console":
        return [*_commands(lines, name, line)]
    if kind in ("yaml", "diff"):
        head = 1 if kind == "yaml" else 2
        paths = {match[1] for text in lines[:head] if (match := _FILE.match(text))}
        if len(lines) <= head or len(paths) != 1:
            raise RunbookError(f"{name}:{line}: a {kind} block begins with the path of its file")
        body = lines[head:]
        if kind == "yaml":
            return [Written(line, *paths, "\n".join(lines) + "\n")]
        if any(text[:1] not in (" ", "+", "-") for text in body) or not any(text[:1] in "+-" for text in body):
            raise RunbookError(f"{name}:{line}: lines of a diff begin with a blank, + or -")
        old, new = ("".join(f"{text[1:]}\n" for text in body if text[0] != other) for other in "+-")
        return [Changed(line, *paths, old, new)]
    raise RunbookError(f"{name}:{line - 1}: a block of kind '{kind}' is not executed; allowed: console, yaml, diff")


def _commands(lines: list[str], name: str, line: int) -> Iterable[Command]:
    starts = [n for n, text in enumerate(lines) if _PROMPT.fullmatch(text)]
    if not starts or starts[0] != 0:
        raise RunbookError(f"{name}:{line}: a console block begins with a prompt: '$ ' or 'host1$ '")
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        match = _PROMPT.fullmatch(lines[start])
        assert match is not None
        hosts = tuple(match[1].split(", ")) if match[1] else (OPERATOR,)
        yield Command(line + start, hosts, match[2], tuple(lines[start + 1 : end]))


# ---- comparing ----


def _pattern(shown: Iterable[str]) -> str:
    """``...`` alone in a line: any lines, or none; in a line: any text, or none. Blanks count as one (columns)."""
    parts = []
    for text in shown:
        words = " ".join(text.split())
        if words == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            # `a ... b` is also `a b`: an empty column
            texts = [".*?".join(map(re.escape, text.split("..."))) for text in f"{words} ".split(" ... ")]
            parts.append("(?: .*)? ".join(texts) + r"\n")
    return "".join(parts)


def matches(shown: Iterable[str], output: str) -> bool:
    """Whether an output is what the page shows. Empty lines at its end do not count."""
    found = "".join(f"{' '.join(text.split())} \n" for text in output.rstrip().splitlines())
    return re.fullmatch(_pattern(shown), found) is not None


# ---- executing ----

Shell = Callable[[str, str], tuple[int, str]]
"""Runs a command at a prompt (host or ``OPERATOR``): exit status, and what both streams show on a terminal."""


def execute(page: Page, shell: Shell, folder: Path, real: Mapping[str, str]) -> None:
    """Do every step of a page, in order. ``folder``: the project. ``real``: what stands in the world in place
    of words of the page (its example addresses).

    Raises:
        RunbookError: a command ends with another status than 0, or shows something else than the page; with
            page, line and both texts.
    """

    def outwards(text: str) -> str:
        return replace(text, real)

    def inwards(text: str) -> str:
        return replace(text, {value: key for key, value in real.items()})

    for step in page.steps:
        where = f"{page.name}:{step.line}"
        if isinstance(step, Written):
            (folder / step.path).write_text(outwards(step.text))
        elif isinstance(step, Changed):
            _change(folder / step.path, outwards(step.old), outwards(step.new), where)
        else:
            for host in step.hosts:
                status, output = shell(host, outwards(step.words))
                output = inwards(output)
                if status != 0 or not matches(step.shown, output):
                    raise RunbookError(
                        f"{where}: {host}$ {step.words}\n--- shown\n" + "\n".join(step.shown) + "\n"
                        f"--- printed, exit status {status}\n{output}"
                    )


def replace(text: str, words: Mapping[str, str]) -> str:
    """Put a value in the place of each word; a word that is only a part of a longer one stays."""
    if not words:
        return text
    alternatives = "|".join(map(re.escape, words))
    return re.sub(rf"(?<![\w.])(?:{alternatives})(?![\w]|\.\w)", lambda match: words[match[0]], text)


def _change(path: Path, old: str, new: str, where: str) -> None:
    place = re.compile("^" + re.escape(old), re.M)  # whole lines
    before = path.read_text()
    found = len(place.findall(before))
    if found != 1:
        raise RunbookError(f"{where}: {path.name} holds this {found} times, not once:\n{old}")
    path.write_text(place.sub(lambda match: new, before))
