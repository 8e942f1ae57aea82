"""Where data is: never two places, never a new empty volume where a live one exists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_inventory
from hypothesis import given
from hypothesis import strategies as st

from swarmmail.model import yamlfile
from swarmmail.model.errors import Refused
from swarmmail.model.facts import HostFacts, Marker
from swarmmail.model.inventory import Stack
from swarmmail.model.placement import known_host, place
from swarmmail.model.stack import Service, StackFile
from swarmmail.model.swarm import HOST_LABEL, Node, Swarm

HOSTS = ("host1", "host2", "host3")
MDA = Service("mda", "mda", "i:1", None, {"mail": "/srv/mail", "index": "/srv/index"}, "5000", (143,))
STACK = StackFile("mail", yamlfile.Document(Path("stack.yml"), {}, None), {"mda": MDA})  # type: ignore[arg-type]


def world(labelled: set[str], copies: dict[str, tuple[int, str, int]]) -> tuple[dict[str, HostFacts], Swarm]:
    """``copies``: host to generation, state and number of volumes there."""
    hosts = {}
    for name in HOSTS:
        generation, state, count = copies.get(name, (0, "", 0))
        names = ["mail_mail", "mail_index"][:count]
        markers = tuple(Marker(volume, "lab", "mda", generation, f"id-{name}", state) for volume in names)
        hosts[name] = HostFacts(name, markers=markers)
    nodes = {
        f"id-{name}": Node(
            f"id-{name}", name, "worker", "ready", "active", "10.0.0.1",
            {HOST_LABEL: name, **({"swarmmail.mda": "true"} if name in labelled else {})},
        )
        for name in HOSTS
    }  # fmt: skip
    return hosts, Swarm("s", "lab", "host1", nodes)


copies = st.dictionaries(
    st.sampled_from(HOSTS), st.tuples(st.integers(1, 3), st.sampled_from(["live", "stale"]), st.integers(1, 2))
)


@given(st.sets(st.sampled_from(HOSTS)), copies, st.sampled_from(HOSTS))
def test_whatever_is_seen(labelled: set[str], there: dict[str, tuple[int, str, int]], wanted: str) -> None:
    hosts, swarm = world(labelled, there)
    whole = {name: g for name, (g, state, count) in there.items() if state == "live" and count == 2}
    try:
        found = place("lab", STACK, MDA, wanted, hosts, swarm)
    except Refused as refused:
        assert "mda" in str(refused) and refused.hint
        return
    assert len(labelled) < 2
    if found.new:
        assert not whole and not labelled and found.host == wanted, "an empty volume beside live data"
    else:
        assert found.host in whole and found.generation == whole[found.host]
        assert labelled in (set(), {found.host})
        assert labelled or whole[found.host] == max(whole.values())


def test_a_first_start_is_where_the_inventory_says() -> None:
    found = place("lab", STACK, MDA, "host3", *world(set(), {}))
    assert (found.host, found.generation, found.new, found.label) == ("host3", 1, True, True)


def test_data_elsewhere_stays_and_is_said() -> None:
    found = place("lab", STACK, MDA, "host3", *world({"host2"}, {"host2": (4, "live", 2)}))
    assert (found.host, found.generation, found.new, found.label) == ("host2", 4, False, False)
    assert "stays on host2" in found.note


@pytest.mark.parametrize(
    ("labelled", "there", "words"),
    [
        ({"host1", "host2"}, {}, "two nodes claim it by label"),
        ({"host1"}, {}, "no volume with a marker"),
        ({"host1"}, {"host2": (1, "live", 2)}, "where there is no live copy|there is no volume"),
        (set(), {"host1": (2, "live", 2), "host2": (2, "live", 2)}, "on several hosts"),
        (set(), {"host1": (2, "stale", 2)}, "only stale copies"),
    ],
)
def test_contradictions_are_for_a_person(
    labelled: set[str], there: dict[str, tuple[int, str, int]], words: str
) -> None:
    with pytest.raises(Refused, match=words):
        place("lab", STACK, MDA, "host3", *world(labelled, there))


EDGE = Service("mda", "edge", "i:1", None, {}, "", (143,))


@pytest.mark.parametrize(
    ("labelled", "found", "label"), [(set(), "host3", True), ({"host3"}, "host3", False), ({"host2"}, "host2", False)]
)
def test_without_data_the_label_alone_says_where(labelled: set[str], found: str, label: bool) -> None:
    hosts, swarm = world(labelled, {"host1": (3, "live", 2)})
    there = place("lab", STACK, EDGE, "host3", hosts, swarm)
    assert (there.host, there.generation, there.new, there.label) == (found, 1, False, label)
    says = "mda stays on host2 (the inventory begins it on host3): it is moved by fab migrate only"
    assert there.note == (says if found == "host2" else "")


def test_without_data_two_labels_are_for_a_person_too() -> None:
    with pytest.raises(Refused, match=r"two nodes claim it by label: host1, host2 -> .*migrate\.abort"):
        place("lab", STACK, EDGE, "host3", *world({"host1", "host2"}, {}))
    hosts, swarm = world({"host1"}, {})
    del hosts["host1"]
    with pytest.raises(Refused, match="it is on node host1, which is not in the inventory -> add it"):
        place("lab", STACK, EDGE, "host3", hosts, swarm)


def test_where_a_service_is_as_far_as_it_is_known() -> None:
    """Before there is a Swarm, and after a move; one that is bound to no host is nowhere, whatever a label says."""
    mm = make_inventory("mm")
    inventory = mm.model_copy(update={"stack": Stack(path=Path("mail"), placement={"web": "host2"})})
    _, moved = world({"host2"}, {})
    assert known_host(EDGE, inventory, None) == "host1" and known_host(EDGE, inventory, moved) == "host2"
    assert known_host(replace(EDGE, name="web", role=""), inventory, moved) == "host2"
    assert known_host(replace(EDGE, role=""), inventory, moved) == ""


def test_volumes_of_another_cluster_do_not_count() -> None:
    hosts, swarm = world(set(), {"host1": (3, "live", 2)})
    assert place("other", STACK, MDA, "host3", hosts, swarm).new
