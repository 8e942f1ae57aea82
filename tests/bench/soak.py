"""Moves of the MDA under mail and IMAP clients, in each of which something goes wrong, drawn at random: half of them
from the faults that the tests know, half from those that may come at any time, after any step.

    python -m tests.bench.soak [N] [--seed SEED] [--only PART-OF-A-FAULT] [--rate 5] [--csv FILE]
    python -m tests.bench.soak --show FILE...    the table of earlier runs, a line for each kind of fault

On three lab hosts of its own, in the checkout's virtual environment; about half a minute a run. A row for each run:
its seed, the fault, how it ended, mails lost and unexpected, moments with two writers, actions of IMAP clients not
kept, IMAP connections that failed, and the longest time without an LMTP greeting (which the fault may have caused
itself).

The exit status is 1 when a run had a violation. ``--seed`` of that row with N = 1 draws the same fault again.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))

import pytest
from conftest import MAIL, Project, eventually
from mailing import PASSWORD, container
from moving import AT_EACH_STEP, FAULTS, READER, USERS, accounts_for, go_wrong, own_lab, place
from stream import Clients, Stream, Watch, lmtp_probe, longest

from swarmmail import report


@dataclass(frozen=True)
class Row:
    seed: int
    fault: str
    end: str
    acknowledged: int
    lost: int
    unexpected: int
    duplicated: int
    overlaps: int
    not_kept: int
    failed: int
    gap: float

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.unexpected or self.overlaps or self.not_kept or self.end.startswith("FAILED"))


def one(project: Project, seed: int, only: str, rate: float) -> Row:
    rng = random.Random(seed)  # noqa: S311
    groups = [[name for name in group if only in name] for group in (FAULTS, AT_EACH_STEP)]
    fault = rng.choice(rng.choice([group for group in groups if group]))
    # the fault of the run before may have an election as its late effect
    eventually(lambda: project.fab("user.list", "--inventory", MAIL).status == 0, 120, "the managers have a leader")
    accounts_for(project)
    with (
        Watch(project) as watch,
        lmtp_probe(project) as greetings,
        Clients(project, [READER], PASSWORD, count=4) as clients,
        Stream(project, USERS, PASSWORD, name=f"s{time.time_ns()}", rate=rate) as stream,
    ):
        time.sleep(1)
        try:
            end = go_wrong(project, fault, rng)
        except (AssertionError, pytest.fail.Exception) as error:
            end = f"FAILED: {error}"
            mend(project)
        time.sleep(1)
    assert watch.blind() == []
    where = place(project)
    verdict = stream.judge(where)
    wrong = clients.judge()
    for address in (*USERS, READER):  # else each run would take longer than the one before
        words = f"docker exec {container(project, where, 'mail_mda')} doveadm expunge -u {address} mailbox '*' all"
        project.sh(where, words, check=False)
    for line in (*verdict.lost, *verdict.unexpected, *watch.overlaps(), *wrong, *clients.failed):
        report.progress(line)
    return Row(
        seed,
        fault,
        end,
        verdict.acknowledged,
        len(verdict.lost),
        len(verdict.unexpected),
        verdict.duplicated,
        len(watch.overlaps()),
        len(wrong),
        len(clients.failed),
        round(longest(greetings), 2),
    )


def read(file: Path) -> list[Row]:
    with file.open(newline="") as lines:
        rows = [list(row.values()) for row in csv.DictReader(lines)]
    return [Row(int(row[0]), row[1], row[2], *map(int, row[3:10]), float(row[10])) for row in rows]


def show(rows: Sequence[Row]) -> None:
    """A line for each kind of fault, wherever it came."""
    kinds: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.fault):
        killed = row.fault.startswith("killed ")
        kinds.setdefault("killed" if killed else row.fault.partition(", after ")[0], []).append(row)
    ends = ("moved", "undone", "left")
    counts = ("acknowledged", "lost", "unexpected", "duplicated", "overlaps", "not_kept")

    def line(group: Sequence[Row]) -> tuple[str, ...]:
        ended = [sum(row.end.startswith(end) for row in group) for end in ends]
        sums = [sum(getattr(row, name) for row in group) for name in counts]
        return tuple(map(str, (len(group), len({row.fault for row in group}), *ended, *sums)))

    table = [(kind, *line(group)) for kind, group in kinds.items()]
    report.table("", ("fault", "runs", "steps", *ends, *counts), [*table, ("all", *line(rows))])


def mend(project: Project) -> None:
    """So that one violation does not spoil the runs after it."""
    project.up(3)
    for words in (("bootstrap", "--no-verify"), ("migrate.resume", "--no-verify"), ("deploy", "--no-verify")):
        project.fab(*words, "--inventory", MAIL, timeout=300)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311
    parser.add_argument("--only", default="")
    parser.add_argument("--rate", type=float, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--show", type=Path, nargs="+")
    given = parser.parse_args()
    if given.show:
        show([row for file in given.show for row in read(file)])
        return 0
    names = [field.name for field in fields(Row)]
    rows: list[Row] = []
    with own_lab("soak") as project:
        for seed in range(given.seed, given.seed + given.runs):
            rows.append(one(project, seed, given.only, given.rate))
            report.progress(" ".join(map(str, astuple(rows[-1]))))
            if given.csv:
                with given.csv.open("w", newline="") as file:
                    csv.writer(file).writerows([names, *map(astuple, rows)])
    report.table("", names, [tuple(map(str, (*astuple(row)[:2], row.end[:60], *astuple(row)[3:]))) for row in rows])
    bad = sum(not row.is_good for row in rows)
    report.result(f"soak: {len(rows)} runs, {bad} with a violation", good=not bad)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
