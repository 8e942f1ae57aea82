"""``mail.services``: what is said when a host's Docker does not answer."""

from __future__ import annotations

from typing import Any

import pytest
from builders import make_facts, make_inventory

from swarmmail.cluster import bootstrap
from swarmmail.mail import services
from swarmmail.model.bootstrap import Observed
from swarmmail.model.errors import HostError, Refused
from swarmmail.model.stack import ROLE_LABEL
from swarmmail.model.swarm import HOST_LABEL, Node, Swarm

STOPPED = make_facts("host1", engine="", units={"docker": ("inactive", "enabled")})


class Fleet:
    def __init__(self) -> None:
        self.inventory = make_inventory("mm")

    def __getitem__(self, name: str) -> str:
        return name


def seen(**facts: Any) -> services.Seen:
    """The MTA's task runs on host1, as the Swarm believes."""
    node = Node("n1", "host1", "manager", "ready", "active", "198.18.0.11", {HOST_LABEL: "host1"})
    swarm = Swarm("s", "lab", "host2", {"n1": node})
    task = {"NodeID": "n1", "Status": {"State": "running", "ContainerStatus": {"ContainerID": "c1"}}}
    return services.Seen(
        Observed({"host1": make_facts("host1", **facts), "host2": make_facts("host2")}, swarm),
        swarm,
        "host2",  # type: ignore[arg-type]
        {"mta": {"Spec": {"Labels": {ROLE_LABEL: "mta"}}}},
        {"mta": [task]},
    )


def test_without_a_swarm_a_stopped_docker_is_named_with_what_to_do() -> None:
    observed = Observed({"host1": STOPPED, "host2": make_facts("host2")})
    with pytest.raises(HostError, match="host1, read the Swarm: Docker does not answer -> run: fab bootstrap"):
        services.observe(Fleet(), observed)  # type: ignore[arg-type]


def test_an_election_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move right after a lost host had come back met one, and gave up."""
    looks: list[bool] = []

    def look(fleet: Fleet, strict: bool) -> Observed:
        looks.append(strict)
        if len(looks) < 3:
            raise bootstrap.Electing("no manager answers for the Swarm", host="host1")
        return Observed({"host1": make_facts("host1")})

    monkeypatch.setattr(bootstrap, "observe", look)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with pytest.raises(Refused, match="there is no Swarm of cluster"):
        services.observe(Fleet())  # type: ignore[arg-type]
    assert looks == [False] * 3


def test_hosts_without_docker_are_in_no_swarm_yet() -> None:
    bare = make_facts("host1", engine="", programs=frozenset())
    with pytest.raises(Refused, match="there is no Swarm of cluster lab yet -> run: fab bootstrap"):
        services.observe(Fleet(), Observed({"host1": bare}))  # type: ignore[arg-type]


def test_a_service_whose_docker_has_stopped_is_not_asked() -> None:
    assert services.running(Fleet(), seen(), "mta").id == "c1"  # type: ignore[arg-type]
    with pytest.raises(HostError, match="host1, find the mta: Docker does not answer -> run: fab bootstrap"):
        services.running(Fleet(), seen(engine=""), "mta")  # type: ignore[arg-type]
