"""Where a service is: by node labels, and where it has data by the markers in the volumes. Pure.

The Swarm is the truth of placement (invariant 4): the inventory only says where a service begins its life.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swarmmail.model.errors import Refused
from swarmmail.model.facts import HostFacts, Marker
from swarmmail.model.inventory import Inventory
from swarmmail.model.stack import Service, StackFile, first_host
from swarmmail.model.swarm import Swarm

LIVE = "live"
FIRST = 1


@dataclass(frozen=True)
class Place:
    """The host of a service that is bound to one. ``new``: its volumes are yet to be made; ``label``: the node lacks
    the label."""

    host: str
    generation: int
    new: bool
    label: bool
    note: str = ""


def markers_of(cluster: str, stack: StackFile, service: Service, facts: HostFacts) -> dict[str, Marker]:
    """The markers of a service's volumes on a host: volume (as named in the file) to marker."""
    names = {stack.volume_name(volume): volume for volume in service.volumes}
    return {
        names[m.volume]: m
        for m in facts.markers
        if m.volume in names and m.cluster == cluster and m.service == service.name
    }


def known_host(service: Service, inventory: Inventory, swarm: Swarm | None) -> str:
    """The host of a service by its label, else the one where the inventory begins it; empty: it runs anywhere."""
    nodes = swarm.nodes.values() if swarm is not None else ()
    first = first_host(service, inventory)
    return next((node.host for node in nodes if first and service.name in node.places), first)


def place(
    cluster: str, stack: StackFile, service: Service, wanted: str, hosts: Mapping[str, HostFacts], swarm: Swarm
) -> Place:
    """Where a service that is bound to a host is, or begins (``wanted``). Without volumes the label alone decides.

    Raises:
        Refused: labels and volumes contradict each other; a person has to decide.
    """
    labelled = [node for node in swarm.nodes.values() if service.name in node.places]
    found = {name: marks for name, facts in hosts.items() if (marks := markers_of(cluster, stack, service, facts))}
    live = {
        name: min(m.generation for m in marks.values())
        for name, marks in found.items()
        if all(m.state == LIVE for m in marks.values()) and len(marks) == len(service.volumes)
    }
    if len(labelled) > 1:
        raise _refused(
            service,
            f"two nodes claim it by label: {', '.join(sorted(n.host or n.id for n in labelled))}",
            "if an interrupted move left one: fab migrate.abort; else remove the wrong one: docker node update "
            f"--label-rm {service.place_label} NODE",
        )
    if labelled:
        node = labelled[0]
        if node.host not in hosts:
            raise _refused(
                service, f"it is on node {node.host or node.hostname}, which is not in the inventory", "add it"
            )
        note = (
            f"{service.name} stays on {node.host} (the inventory begins it on {wanted}): "
            "it is moved by fab migrate only"
            if wanted != node.host
            else ""
        )
        if not service.volumes:
            return Place(node.host, FIRST, new=False, label=False, note=note)
        if node.host not in live:
            where = f"; live data is on {', '.join(sorted(live))}" if live else ""
            if not live and not found.get(node.host):
                raise _refused(
                    service,
                    f"the label says that its data is on {node.host}, but there is no volume with a marker",
                    "bring the volume back; or, if the data is lost for good, remove the label "
                    f"(docker node update --label-rm {service.place_label} {node.hostname}) and deploy an empty one",
                )
            raise _refused(
                service,
                f"the label is on {node.host}, where there is no live copy of all its volumes{where}",
                "put the label where the live data is: docker node update --label-add "
                f"{service.place_label}=true NODE, and --label-rm it elsewhere",
            )
        return Place(node.host, live[node.host], new=False, label=False, note=note)
    if not service.volumes:
        return Place(wanted, FIRST, new=False, label=True)
    if live:
        best = max(live.values())
        holders = [name for name, generation in live.items() if generation == best]
        if len(holders) > 1:
            raise _refused(
                service,
                f"live data of generation {best} is on several hosts: {', '.join(sorted(holders))}",
                "decide which is the right one and label its node: docker node update --label-add "
                f"{service.place_label}=true NODE",
            )
        return Place(
            holders[0], best, new=False, label=True, note=f"{service.name}: its data was found on {holders[0]}"
        )
    if any(marks for marks in found.values()):
        half = {n for n, marks in found.items() if all(m.state == LIVE for m in marks.values())}
        if half == {wanted}:
            return Place(wanted, FIRST, new=True, label=True)  # killed between its first and its last volume
        raise _refused(
            service, f"there are only stale copies of its data, on {', '.join(sorted(found))}", "see fab status"
        )
    return Place(wanted, FIRST, new=True, label=True)


def _refused(service: Service, what: str, hint: str) -> Refused:
    return Refused(what, host=None, step=f"place {service.name}", hint=hint)
