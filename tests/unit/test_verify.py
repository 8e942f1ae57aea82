"""What ``verify`` says of services that are not there to be measured."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

from builders import make_facts

from swarmmail.mail import verify
from swarmmail.model.errors import HostError
from swarmmail.wire.verdict import End


class Manager:
    def __init__(self, services: dict[str, int] | None) -> None:
        self.services = services
        self.docker = SimpleNamespace(services=self._services)

    def _services(self) -> list[dict[str, Any]]:
        if self.services is None:
            raise HostError("the swarm does not have a leader", host="host1")
        return [{"Spec": {"Name": n, "Mode": {"Replicated": {"Replicas": r}}}} for n, r in self.services.items()]

    def doing(self, step: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Fleet(dict[str, Manager]):
    inventory = SimpleNamespace(stack=SimpleNamespace(name="mail"))


def absent(services: dict[str, int] | None, running: tuple[str, ...]) -> list[tuple[str, str]]:
    ends = tuple(End("host1", name, "10.90.1.2", "02:42:0a:5a:01:02", 1, "10.90.0.1") for name in running)
    plan = verify.Plan(ends, (), "wireguard", 4097, "net", "10.90.1.0/24", {"mta": "mta", "mda": "mda"})
    facts = {"host1": make_facts("host1", is_manager=True)}
    found = verify._absent(Fleet(host1=Manager(services)), facts, plan)  # type: ignore[arg-type]
    assert all(one.outcome == "unknown" for one in found)
    return [(one.pair, one.causes[0].name) for one in found]


def test_a_deployed_service_without_a_running_task_is_unknown() -> None:
    assert absent({"mail_mta": 1, "mail_mda": 1}, ("mta",)) == [("mda", "not-running")]
    assert absent({"mail_mta": 1, "mail_mda": 1}, ()) == [("mda", "not-running"), ("mta", "not-running")]
    assert absent({"mail_mta": 1, "mail_mda": 1}, ("mta", "mda")) == []


def test_what_is_not_deployed_or_was_stopped_by_hand_is_not_missed() -> None:
    assert absent({}, ()) == []
    assert absent({"mail_mta": 1, "mail_mda": 0}, ("mta",)) == []


def test_without_a_leader_nothing_is_known() -> None:
    assert absent(None, ("mta",)) == [("host1", "away")]
