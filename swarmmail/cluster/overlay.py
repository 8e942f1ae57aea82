"""The overlay for LMTP: it belongs to swarmmail, not to a stack, so that no ``stack rm`` can take it away."""

from __future__ import annotations

import docker.errors
from docker.types import IPAMConfig, IPAMPool

from swarmmail.hosts.connection import Host
from swarmmail.hosts.dockerapi import patiently
from swarmmail.model.bootstrap import Design
from swarmmail.model.swarm import CLUSTER_LABEL


def create(manager: Host, design: Design) -> None:
    """Create the network; one that came to be meanwhile is left for the check at the end to judge."""
    options = {"com.docker.network.driver.mtu": str(design.network_mtu)}
    if design.encryption == "ipsec":
        options["encrypted"] = "true"  # the driver only looks whether the key is there (F14)

    def once() -> None:
        manager.docker.create_network(
            design.inventory.network.name,
            driver="overlay",
            options=options,
            ipam=IPAMConfig(pool_configs=[IPAMPool(subnet=design.overlay_subnet)]),
            labels={CLUSTER_LABEL: design.inventory.cluster},
            attachable=True,
            scope="swarm",
        )

    with manager.doing("create the overlay"):
        try:
            patiently(once)
        except docker.errors.APIError as error:
            if "already exists" not in str(error):
                raise
