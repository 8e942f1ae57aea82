"""The running services of a stack: found by role, never by name, down to the container on its host."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swarmmail.cluster import bootstrap
from swarmmail.hosts.connection import Host, Result
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import bootstrap as model
from swarmmail.model.bootstrap import Observed
from swarmmail.model.errors import HostError, Refused, Unreachable
from swarmmail.model.stack import ROLE_LABEL, STACK_LABEL
from swarmmail.model.swarm import Swarm


@dataclass(frozen=True)
class Seen:
    """The Swarm, the hosts' facts, and this stack's services and tasks as a manager's API gives them."""

    observed: Observed
    swarm: Swarm
    manager: Host
    services: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Service as named in the stack file to what the API says."""
    tasks: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Service to its tasks, the newest first."""
    networks: Mapping[str, str] = field(default_factory=dict)

    def live(self, service: str) -> frozenset[str]:
        """Hosts with a live volume of a service; none for a service without volumes."""
        assert self.swarm is not None
        return frozenset(
            name
            for name, facts in self.observed.hosts.items()
            for m in facts.markers
            if (m.cluster, m.service, m.state) == (self.swarm.cluster, service, "live")
        )

    def host_of(self, task: Mapping[str, Any]) -> str:
        """The host that a task is on; its node id if that is not in the inventory, empty if nowhere yet."""
        node = self.swarm.nodes.get(task.get("NodeID", ""))
        return (node.host or node.hostname) if node is not None else str(task.get("NodeID", ""))


def observe(fleet: Fleet, observed: Observed | None = None) -> Seen:
    """Everything that deploy and status want to know. An election is waited for.

    Raises:
        Refused: there is no Swarm of ours.
    """
    if observed is None:
        observed = bootstrap.after_the_election(lambda: bootstrap.observe(fleet, strict=False))
    swarm = observed.swarm
    silent = {name: facts.unreachable for name, facts in observed.hosts.items() if facts.unreachable}
    if swarm is None and silent:
        name, why = next(iter(silent.items()))
        raise Unreachable(why, host=name, step="ssh", hint="no other host is a manager that answers")
    if swarm is None and (mute := model.silent(observed.hosts)):
        raise HostError("Docker does not answer", host=mute[0], step="read the Swarm", hint="run: fab bootstrap")
    if swarm is None or swarm.cluster != fleet.inventory.cluster:
        raise Refused(
            f"there is no Swarm of cluster {fleet.inventory.cluster} yet", step="deploy", hint="run: fab bootstrap"
        )
    manager = fleet[swarm.manager]
    stack = fleet.inventory.stack
    name = stack.name if stack is not None else ""
    label = f"{STACK_LABEL}={name}"
    with manager.doing("read the services"):
        services = manager.docker.services(filters={"label": label})
        tasks = manager.docker.tasks(filters={"label": label})
    by_id = {raw["ID"]: raw["Spec"]["Name"].removeprefix(f"{name}_") for raw in services}
    sorted_tasks: dict[str, list[dict[str, Any]]] = {short: [] for short in by_id.values()}
    for task in sorted(tasks, key=lambda task: task["CreatedAt"], reverse=True):
        if task["ServiceID"] in by_id:
            sorted_tasks[by_id[task["ServiceID"]]].append(task)
    return Seen(
        observed=observed,
        swarm=swarm,
        manager=manager,
        services={by_id[raw["ID"]]: raw for raw in services},
        tasks=sorted_tasks,
        networks={network.id: network.name for network in swarm.networks.values()},
    )


@dataclass(frozen=True)
class Container:
    """A running container of a service."""

    host: Host
    id: str
    service: str
    labels: Mapping[str, str]
    """The service's labels."""

    def exec(self, command: str, stdin: str = "", *, step: str, timeout: float = 30, check: bool = True) -> Result:
        """Run a shell command inside, with ``stdin``; what is secret goes there, not into ``command``."""
        words = f"{self._exec(stdin)} sh -c {shlex.quote(command)}"
        return self.host.run(words, stdin=stdin, step=step, timeout=timeout, check=check)

    def _exec(self, stdin: str) -> str:
        """Without input no ``-i``: an input that ends at once may be lost, and the exec then waits for ever
        (moby/moby#37870)."""
        return f"docker exec {'-i ' if stdin else ''}{self.id}"

    def call(self, command: str, *arguments: str, stdin: str = "", step: str) -> str:
        """Run a program inside; its output. Its own one-line error becomes ours."""
        words = " ".join([self._exec(stdin), command, *map(shlex.quote, arguments)])
        result = self.host.run(words, stdin=stdin, step=step, timeout=60, check=False)
        if not result.ok:
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise HostError(lines[-1] if lines else f"exit status {result.status}", host=self.host.name, step=step)
        return result.stdout


def running(fleet: Fleet, seen: Seen, role: str) -> Container:
    """The running container of the service with a role (mta, mda).

    Raises:
        Refused: no service has the role, or it does not run now.
    """
    for name, raw in seen.services.items():
        labels = raw["Spec"].get("Labels") or {}
        if labels.get(ROLE_LABEL) != role:
            continue
        live = seen.live(name)
        for task in seen.tasks[name]:
            if live and seen.host_of(task) not in live:
                continue  # during a move: it waits behind its fence
            container = (task["Status"].get("ContainerStatus") or {}).get("ContainerID")
            host = seen.host_of(task)
            if task["Status"]["State"] == "running" and container and host in fleet.inventory.hosts:
                if host in model.silent(seen.observed.hosts):  # the Swarm has not noticed yet
                    raise HostError(
                        "Docker does not answer", host=host, step=f"find the {role}", hint="run: fab bootstrap"
                    )
                return Container(fleet[host], container, name, labels)
        raise Refused(f"service {name} ({role}) does not run now", step=f"find the {role}", hint="see: fab status")
    raise Refused(
        f"no service of the stack has the label {ROLE_LABEL}: {role}", step=f"find the {role}", hint="run: fab deploy"
    )
