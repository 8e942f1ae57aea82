"""How long the MDA is away when it moves: ``fab migrate``, the naive way, and the limit, on the same hosts.

    python -m tests.bench.move [--sizes small,medium,large] [--reps 3] [--csv FILE]
    python -m tests.bench.move --show FILE     the table and the plot of an earlier run

Run it in the folder of the checkout, in its virtual environment, on a machine that does nothing else.

Ways
    migrate   ``fab migrate``, there and back
    naive     a copy while it runs, then stop (label off), rsync, label on the target: what a good practitioner types.
              The markers of the volumes, which forbid just that, are written by hand
    restart   ``docker restart`` of the same image in a plain container, with no data and no move at all: the limit

First copies, in seconds
    rsync     plain rsync -aHAX over SSH, from host to host, into an empty folder
    synced    the same, and then the target's file system written to the disk (``sync -f``)
    precopy   the same by ``fab migrate``: all its passes while the service runs, and that flush

Sizes
    small     10 MB / 500 files
    medium    1 GB / 50,000 files
    large     4 GB / 200,000 files

The gap is the longest time without an LMTP greeting, asked 20 times a second from the MTA's network (from the host's
own network for ``restart``), while 5 mails a second arrive. Where mails were lost, the row says how many.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))

from conftest import MAIL, Project, eventually
from mailing import PASSWORD, container, marker, volume
from moving import NO_PROOF, USERS, accounts_for, labelled, other, own_lab, place, serves
from stream import Stream, lmtp_probe, longest

from swarmmail import report

SIZES = {"small": (10, 500), "medium": (1000, 50_000), "large": (4000, 200_000)}
"""Megabytes, files."""
FILL = """
import os, pathlib
root, megabytes, files = pathlib.Path({root!r}), {megabytes}, {files}
block = os.urandom(megabytes * 10**6 // files)
for number in range(files):
    folder = root / "padding" / f"user{{number // 1000}}" / "Maildir" / "cur"
    if number % 1000 == 0:
        folder.mkdir(parents=True)
    (folder / f"{{1700000000 + number}}.M1P1.mda,S={{len(block)}}:2,S").write_bytes(b"%d " % number + block)
"""


@dataclass(frozen=True)
class Row:
    way: str
    size: str
    gap: float
    seconds: float
    """Of the whole command."""
    lost: int
    duplicated: int


WAYS = ("migrate", "naive", "restart")


def migrate(project: Project, target: str) -> str:
    words = ("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF, "--times")
    result = project.fab(*words, timeout=1800, check=0)
    for line in (*result.events, *result.stdout.splitlines()):
        report.progress(line)
    return result.stdout


def rsync(project: Project, source: str, target: str, there: str) -> str:
    """The command that copies the mail volume of ``source`` into a folder of ``target``."""
    key = "ssh -i /run/naive -o StrictHostKeyChecking=no -o LogLevel=ERROR"
    path = volume(project, source, "mail_mail")
    return f"rsync -aHAX --numeric-ids --delete -e '{key}' {path}/ root@{project.address(target)}:{there}/"


def naive(project: Project, target: str) -> None:
    source = place(project)
    path = volume(project, source, "mail_mail")
    there = volume(project, target, "mail_mail")
    copy = rsync(project, source, target, there)
    project.sh(source, copy + " || [ $? = 24 ]", timeout=1800)
    node = {raw["Spec"]["Labels"]["swarmmail.host"]: raw["ID"] for raw in project.host("host1").docker.nodes()}
    project.sh("host1", f"docker node update --label-rm swarmmail.mda {node[source]}")
    eventually(lambda: not container(project, source, "mail_mda"), 60)
    project.sh(source, copy, timeout=1800)
    text = "".join(f"{k}={v}\n" for k, v in {**marker(project, source, "mail_mail"), "node": node[target]}.items())
    project.sh(target, f"cat >{there}/.swarmmail-volume <<'EOF'\n{text}EOF")
    project.sh("host1", f"docker node update --label-add swarmmail.mda=true {node[target]}")
    eventually(lambda: serves(project, target), 120)
    project.sh(source, f"sed -i s/state=live/state=stale/ {path}/.swarmmail-volume")


def measured(project: Project, way: str, size: str) -> Row:
    source = place(project)
    with (
        lmtp_probe(project) as greetings,
        Stream(project, USERS, PASSWORD, name=f"b{time.time_ns()}", rate=5) as stream,
    ):
        time.sleep(2)
        began = time.monotonic()
        {"migrate": migrate, "naive": naive}[way](project, other(source))
        seconds = time.monotonic() - began
        time.sleep(3)
    assert labelled(project) == [place(project)]
    verdict = stream.judge(place(project))
    return Row(way, size, round(longest(greetings), 2), round(seconds, 1), len(verdict.lost), verdict.duplicated)


LIMIT = """
mkdir -p /run/limit && cd /run/limit
for secret in tls-certificate tls-key; do docker exec $mda cat /run/secrets/$secret >$secret; chmod 644 $secret; done
docker run -d --name limit --read-only -e MAIL_DOMAIN=lab.test -v limit:/srv/mail -v /run/limit:/run/secrets:ro \\
  --tmpfs /run/dovecot:mode=1777 --tmpfs /tmp $(docker inspect -f '{{.Image}}' $mda) >/dev/null
address=$(docker inspect -f '{{.NetworkSettings.IPAddress}}' limit)
"""
PROBE = """
timeout 12 bash -c 'trap "" PIPE; while :; do if exec 3<>/dev/tcp/'$address'/24 && read -r -t 1 line <&3; then
case $line in 220*) date +%s.%N ;; esac; echo QUIT >&3; exec 3>&-; fi 2>/dev/null; sleep 0.05; done' &
sleep 3
docker restart limit >/dev/null
wait
docker rm -f limit >/dev/null; docker volume rm limit >/dev/null
"""


def limit(project: Project, size: str) -> Row:
    """``docker restart`` of a plain container with the same image. How much data there is does not matter to it."""
    host = place(project)
    script = f"mda={container(project, host, 'mail_mda')}\n{LIMIT}{PROBE}"
    moments = [float(line) for line in project.sh(host, script).splitlines() if line[:1].isdigit()]
    return Row("restart", size, round(longest(moments), 2), 0, 0, 0)


def fill(project: Project, size: str) -> list[Row]:
    """Both hosts hold the data: a first copy takes as long as it takes, and is no part of the gap. The first copies."""
    megabytes, files = SIZES[size]
    source = place(project)
    target = other(source)
    root = volume(project, source, "mail_mail")
    script = FILL.format(root=root, megabytes=megabytes, files=files)
    project.sh(source, f"rm -rf {root}/padding; python3 - <<'EOF'\n{script}\nEOF", timeout=1800)
    project.fab("migrate.purge", "--inventory", MAIL, check=0)
    rows = []
    began = time.monotonic()
    project.sh(source, rsync(project, source, target, "/var/lib/docker/plain") + " || [ $? = 24 ]", timeout=1800)
    rows.append(Row("rsync", size, 0, round(time.monotonic() - began, 1), 0, 0))
    project.sh(target, "sync -f /var/lib/docker/plain", timeout=1800)
    rows.append(Row("synced", size, 0, round(time.monotonic() - began, 1), 0, 0))
    [seconds] = re.findall(r"^precopy +(\S+)", migrate(project, target), re.M)
    rows.append(Row("precopy", size, 0, round(float(seconds), 1), 0, 0))
    # not before: ext4 looks for a long time for an inode that was not deleted in the last minutes
    project.sh(target, "rm -rf /var/lib/docker/plain; sync")
    migrate(project, source)
    return rows


def show(rows: Sequence[Row]) -> None:
    """The table, the medians, and the gaps as bars."""
    names = [field.name for field in fields(Row)]
    report.table("", names, [tuple(map(str, astuple(row))) for row in rows])
    sizes = list(dict.fromkeys(row.size for row in rows))
    for size in sizes:
        first = {row.way: row.seconds for row in rows if row.size == size and row.way not in WAYS}
        if first:
            words = ", ".join(f"{way} {seconds} s" for way, seconds in first.items())
            report.result(f"{size}, first copy: {words}")
    report.result("")
    longest_gap = max(row.gap for row in rows)
    for size in sizes:
        for way in WAYS:
            gaps = [row.gap for row in rows if (row.way, row.size) == (way, size)]
            bar = "\u2588" * max(1, round(60 * statistics.median(gaps) / longest_gap))
            report.result(f"{size:7}{way:8}{bar} {statistics.median(gaps):.2f} s (at most {max(gaps):.2f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--show", type=Path)
    given = parser.parse_args()
    if given.show:
        with given.show.open(newline="") as file:
            table = list(csv.reader(file))[1:]
        show([Row(a, b, float(c), float(d), int(e), int(f)) for a, b, c, d, e, f in table])
        return 0
    rows: list[Row] = []
    with own_lab("move") as project:
        accounts_for(project)
        let_in(project)
        for size in given.sizes.split(","):
            rows += fill(project, size)
            for _ in range(given.reps):
                for way in WAYS:
                    rows.append(limit(project, size) if way == "restart" else measured(project, way, size))
                    report.progress(" ".join(map(str, astuple(rows[-1]))))
                    if given.csv:
                        with given.csv.open("w", newline="") as file:
                            csv.writer(file).writerows([[field.name for field in fields(Row)], *map(astuple, rows)])
    show(rows)
    return 0


def let_in(project: Project) -> None:
    """A key for the naive way."""
    for host in ("host2", "host3"):
        project.sh(host, "ssh-keygen -q -t ed25519 -N '' -f /run/naive")
        key = project.sh(host, "cat /run/naive.pub")
        project.sh(other(host), f"echo '{key.strip()}' >>/root/.ssh/authorized_keys")


if __name__ == "__main__":
    raise SystemExit(main())
