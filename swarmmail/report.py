"""The only module that prints.

On a terminal: colours and tables (rich). Elsewhere: plain lines, one event a line, so that a log stays
readable. With ``--json`` nothing but one JSON document is written to standard output. Progress goes to
standard error, results to standard output. ``NO_COLOR`` is honoured (by rich itself).
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

_started = time.monotonic()
_lock = threading.Lock()
_quiet = False


def quiet(on: bool = True) -> None:
    """Silence progress lines (used with ``--json``); results and errors still come."""
    global _quiet
    _quiet = on


def _console(err: bool = False) -> Any:
    from rich.console import Console  # imported late: half of the tasks print plain lines only

    return Console(stderr=err, highlight=False, soft_wrap=True)


def _line(text: str, style: str | None = None, err: bool = True) -> None:
    stream = sys.stderr if err else sys.stdout
    with _lock:
        if style and stream.isatty():
            from rich.text import Text

            _console(err).print(Text(text, style=style))
        else:
            print(text, file=stream, flush=True)


def progress(text: str, host: str | None = None) -> None:
    """Say what is going on now: seconds since the start, host, event."""
    if not _quiet:
        where = f"{host}: " if host else ""
        _line(f"{time.monotonic() - _started:6.1f} s  {where}{text}")


def heading(text: str) -> None:
    if not _quiet:
        _line(text, "bold")


def warning(text: str) -> None:
    _line(f"warning: {text}", "bold yellow")


def error(text: str) -> None:
    _line(text, "bold red")


def result(text: str, good: bool | None = None) -> None:
    """A result of the task, on standard output."""
    _line(text, {True: "bold green", False: "bold red", None: None}[good], err=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print what people compare: a table on a terminal, aligned plain lines elsewhere."""
    body = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.table import Table

        grid = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            grid.add_column(column)
        for row in body:
            grid.add_row(*row)
        with _lock:
            _console().print(grid)
        return
    widths = [max([len(str(c)), *(len(row[i]) for row in body)]) for i, c in enumerate(columns)]
    lines = [title] if title else []
    for row in [list(columns), *body]:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    _line("\n".join(lines), err=False)


def document(value: Any) -> None:
    """Print one JSON document on standard output (``--json``)."""
    print(json.dumps(value, indent=2, sort_keys=True, default=str), flush=True)


@contextlib.contextmanager
def transfer(what: str, size: int, host: str | None = None) -> Iterator[Callable[[int], None]]:
    """Progress of a transfer of ``size`` bytes: call the yielded function with each number of bytes sent.

    A line every two seconds (bytes, rate, time left), and one at the end.
    """
    began = last = time.monotonic()
    done = 0

    def sent(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= 2 and done < size:
            last = now
            rate = done / (now - began)
            left = (size - done) / rate if rate else 0
            progress(f"{what}: {done / 1e6:.0f} of {size / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s, {left:.0f} s left", host)

    yield sent
    seconds = time.monotonic() - began
    progress(f"{what}: {done / 1e6:.1f} MB in {seconds:.1f} s", host)
