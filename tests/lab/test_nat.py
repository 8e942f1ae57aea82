"""A host that the others cannot open connections to: it calls them, and keeps the way open."""

from __future__ import annotations

import pytest
from conftest import Project

pytestmark = pytest.mark.lab


def test_a_host_behind_nat_joins_and_is_reached_through_the_tunnel(fresh: Project) -> None:
    others = ", ".join(fresh.address(host) for host in ("host1", "host2"))
    # what a translating router does to a packet that nobody inside asked for
    fresh.sh(
        "host3",
        "nft 'add table inet router; add chain inet router in { type filter hook input priority -10; }; "
        f"add rule inet router in ip saddr {{ {others} }} ct state != established drop'",
    )
    try:
        hosts = {"host1": {}, "host2": {}, "host3": {"role": "worker", "nat": True}}
        inventory = fresh.inventory("nat", hosts, managers=2)
        fresh.bootstrap(inventory, check=0)
        config = fresh.sh("host1", "cat /etc/wireguard/swarmmail.conf")
        peer = config.split("# host3")[1].split("# ")[0]
        assert "Endpoint" not in peer
        assert "PersistentKeepalive" in peer
        address = fresh.sh("host3", "sed -n 's,^Address = \\(.*\\)/.*,\\1,p' /etc/wireguard/swarmmail.conf").strip()
        fresh.sh("host1", f"ping -c 1 -W 3 {address}")
        assert "100% packet loss" in fresh.sh("host1", f"ping -c 1 -W 1 {fresh.address('host3')}", check=False)
        assert fresh.bootstrap(inventory, check=0).stdout.endswith("nothing to do\n")
    finally:
        fresh.sh("host3", "nft delete table inet router")
