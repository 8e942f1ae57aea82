"""Swarm and overlay."""

from __future__ import annotations

from typing import Any

from swarmmail import report
from swarmmail.cluster import bootstrap as cluster
from swarmmail.tasks.door import door, dry, fleet


@door
def bootstrap(c: Any, inventory: str | None = None, plan: bool = False) -> None:
    """Make one Swarm of the hosts, with the encrypted overlay for LMTP.

    Changes: installs Docker (and WireGuard) where missing, joins the hosts, labels the nodes, creates the
    overlay. Run again, it repairs what is missing and leaves the rest. --plan only shows what it would do.
    """
    hosts = fleet(c, inventory)
    if dry(c, plan):
        cluster.show(cluster.decide(hosts.inventory, cluster.observe(hosts))[1])
    elif cluster.run(hosts):
        report.result(f"bootstrap: {hosts.inventory.cluster} is as the inventory wants it", good=True)
    else:
        report.result("bootstrap: nothing to do")
