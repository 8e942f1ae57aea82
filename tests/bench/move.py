"""How long the MDA is away when it moves: ``fab migrate``, the naive way, and the limit, on the same hosts.

    python -m tests.bench.move [--sizes small,medium,large] [--reps 3] [--csv FILE]

Run it in the folder of the checkout, in its virtual environment, on a machine that does nothing else.

Ways
    migrate   ``fab migrate``, there and back
    naive     a copy while it runs, then stop (label off), rsync, label on the target: what a good practitioner types.
              The markers of the volumes, which forbid just that, are written by hand
    restart   ``docker restart`` of the same image in a plain container, with no data and no move at all: the limit

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
import statistics
import sys
import time
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


def migrate(project: Project, target: str) -> None:
    words = ("migrate", "--service", "mda", "--to", target, "--inventory", MAIL, NO_PROOF, "--times")
    for line in project.fab(*words, timeout=1800, check=0).stdout.splitlines():
        report.progress(line)


def naive(project: Project, target: str) -> None:
    source = place(project)
    path = volume(project, source, "mail_mail")
    there = volume(project, target, "mail_mail")
    key = "ssh -i /run/naive -o StrictHostKeyChecking=no -o LogLevel=ERROR"
    copy = f"rsync -aHAX --numeric-ids --delete -e '{key}' {path}/ root@{project.address(target)}:{there}/"
    project.sh(source, copy + " || [ $? = 24 ]", timeout=1800)
    node = {raw["Spec"]["Labels"]["swarmmail.host"]: raw["ID"] for raw in project.host("host1").docker.nodes()}
    project.sh("host1", f"docker node update --label-rm swarmmail.mda {node[source]}")
    eventually(lambda: not container(project, source, "mail_mda"), 60)
    project.sh(source, copy, timeout=1800)
    text = "".join(f"{k}={v}\n" for k, v in {**marker(project, target, "mail_mail"), "node": node[target]}.items())
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


def fill(project: Project, size: str) -> None:
    """Both hosts hold the data: a first copy takes as long as it takes, and is no part of the gap."""
    megabytes, files = SIZES[size]
    host = place(project)
    root = volume(project, host, "mail_mail")
    script = FILL.format(root=root, megabytes=megabytes, files=files)
    project.sh(host, f"rm -rf {root}/padding; python3 - <<'EOF'\n{script}\nEOF", timeout=1800)
    migrate(project, other(host))
    migrate(project, host)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    names = [field.name for field in fields(Row)]
    rows: list[Row] = []
    with own_lab("move") as project:
        accounts_for(project)
        let_in(project)
        for size in given.sizes.split(","):
            fill(project, size)
            for _ in range(given.reps):
                for way in ("migrate", "naive", "restart"):
                    rows.append(limit(project, size) if way == "restart" else measured(project, way, size))
                    report.progress(" ".join(map(str, astuple(rows[-1]))))
    if given.csv:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows([names, *map(astuple, rows)])
    report.table("", names, [tuple(map(str, astuple(row))) for row in rows])
    for size in given.sizes.split(","):
        for way in ("migrate", "naive", "restart"):
            gaps = [row.gap for row in rows if (row.way, row.size) == (way, size)]
            report.result(f"{size}, {way}: gap {statistics.median(gaps):.2f} s, at most {max(gaps):.2f} s")
    return 0


def let_in(project: Project) -> None:
    """A key for the naive way."""
    for host in ("host2", "host3"):
        project.sh(host, "ssh-keygen -q -t ed25519 -N '' -f /run/naive")
        key = project.sh(host, "cat /run/naive.pub")
        project.sh(other(host), f"echo '{key.strip()}' >>/root/.ssh/authorized_keys")


if __name__ == "__main__":
    raise SystemExit(main())
