"""The proof that the mail network is encrypted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swarmmail import report
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import verify as proof
from swarmmail.tasks.door import door, duration, fleet, status


@door
def verify(
    c: Any, inventory: str | None = None, json: bool = False, keep_pcap: str | None = None, watch: str | None = None
) -> None:
    """Prove on the wire that the mail network is encrypted between its hosts. Exit status 0: all pairs proven.

    Changes nothing that stays: captures on the hosts, sends a marker from task to task, forges packets, and delivers a
    large message to the account swarmmail-probe, which exists only meanwhile. --keep-pcap DIR saves the packets.
    """
    hosts = fleet(c, inventory)
    folder = Path(keep_pcap) if keep_pcap else None
    if watch is not None:
        proof.watch(hosts, duration("watch", watch), folder)
    found = proof.run(hosts, folder)
    if json:
        report.document(proof.document(found))
    else:
        proof.show(found)
    if not proof.all_proven(found):
        status(1)


def at_the_end(hosts: Fleet, left_out: bool) -> None:
    """As the last step of a task that changed something: the proof, in a line a pair; the task fails without it."""
    if left_out:
        report.progress("verify: left out: whether the mail network is encrypted is not known")
        return
    found = proof.run(hosts)
    proof.lines(found)
    if found and not proof.all_proven(found):
        status(1)
