"""The Swarm: seen through a manager's API, and changed there. Join tokens travel in request bodies only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import docker.errors
import tenacity

from swarmmail.hosts.connection import Host
from swarmmail.hosts.dockerapi import patiently
from swarmmail.model import facts
from swarmmail.model.bootstrap import GOSSIP_PORT
from swarmmail.model.errors import HostError
from swarmmail.model.patience import patient
from swarmmail.model.swarm import CLUSTER_LABEL, HOST_LABEL, Network, Node, Swarm

T = TypeVar("T")
PORT = 2377
JOIN_TIMEOUT = patient(45)  # seconds
DOCUMENTED_CERTIFICATE_LIFE = 90 * 24 * 3600  # Docker's default, kept


def view(manager: Host) -> Swarm:
    """Nodes, networks and identity of the Swarm that ``manager`` manages. Raises HostError."""
    api = manager.docker
    with manager.doing("read the Swarm"):
        swarm = api.inspect_swarm()
        nodes = api.nodes()
        networks = api.networks(filters={"driver": "overlay"})
    return Swarm(
        id=swarm["ID"],
        cluster=(swarm["Spec"].get("Labels") or {}).get(CLUSTER_LABEL, ""),
        manager=manager.name,
        nodes={raw["ID"]: _node(raw) for raw in nodes},
        networks={raw["Name"]: _network(raw) for raw in networks if raw.get("Scope") == "swarm"},
    )


def membership(host: Host) -> dict[str, Any]:
    """What the Docker of a host says of itself and of its part in the Swarm, as fields of its facts. Raises HostError.

    As ``facts.sh`` asks it; this is for asking again and again."""
    api = host.docker
    with host.doing("read the membership"):
        info, peers = api.info(), None
        if (info.get("Swarm") or {}).get("LocalNodeState") == "active":
            with contextlib.suppress(docker.errors.NotFound):
                peers = facts.peers_of(api.inspect_network("ingress"))
    return facts.of_docker(info, peers)


def _node(raw: dict[str, Any]) -> Node:
    status = raw.get("ManagerStatus") or {}
    return Node(
        id=raw["ID"],
        hostname=raw["Description"].get("Hostname", ""),
        role=raw["Spec"]["Role"],
        state=raw["Status"]["State"],
        availability=raw["Spec"]["Availability"],
        address=raw["Status"].get("Addr", ""),
        labels=raw["Spec"].get("Labels") or {},
        leader=bool(status.get("Leader")),
        engine=raw["Description"].get("Engine", {}).get("EngineVersion", ""),
    )


def _network(raw: dict[str, Any]) -> Network:
    options = raw.get("Options") or {}
    pools = (raw.get("IPAM") or {}).get("Config") or [{}]
    return Network(
        id=raw["Id"],
        name=raw["Name"],
        driver=raw["Driver"],
        encrypted="encrypted" in options,  # the driver looks for the key, whatever its value (F14)
        subnet=pools[0].get("Subnet", ""),
        mtu=options.get("com.docker.network.driver.mtu", ""),
        attachable=bool(raw.get("Attachable")),
        cluster=(raw.get("Labels") or {}).get(CLUSTER_LABEL, ""),
    )


def init(host: Host, cluster: str, address: str, listen: str, pool: str) -> None:
    """Make the Swarm. ``pool``: the subnet from which Swarm takes addresses for networks of its own."""
    with host.doing("swarm init"):
        spec = host.docker.create_swarm_spec(labels={CLUSTER_LABEL: cluster})
        host.docker.init_swarm(
            advertise_addr=address,
            listen_addr=f"{listen}:{PORT}",
            data_path_addr=address,
            default_addr_pool=[pool],
            subnet_size=24,
            swarm_spec=spec,
        )


def worker_token(manager: Host) -> str:
    with manager.doing("read the join token"):
        token: str = manager.docker.inspect_swarm()["JoinTokens"]["Worker"]
        return token


def join(host: Host, token: str, address: str, listen: str, manager_address: str) -> str:
    """Join as a worker; the node id. A join that times out goes on in the background (F27), so what
    counts is the state afterwards, not the answer."""
    api = host.docker
    failed: docker.errors.APIError | None = None
    with host.doing("swarm join"):
        try:
            api.join_swarm(
                remote_addrs=[f"{manager_address}:{PORT}"],
                join_token=token,
                listen_addr=f"{listen}:{PORT}",
                advertise_addr=address,
                data_path_addr=address,
            )
        except docker.errors.APIError as error:
            failed = error

        def state() -> dict[str, Any]:
            swarm: dict[str, Any] = api.info()["Swarm"]
            return swarm

        swarm = wait_until(state, lambda seen: seen["LocalNodeState"] != "pending", JOIN_TIMEOUT, pause=0.1)
    if swarm["LocalNodeState"] != "active":
        reason = swarm.get("Error") or (str(failed.explanation) if failed else swarm["LocalNodeState"])
        raise HostError(
            reason,
            host=host.name,
            step="swarm join",
            hint=f"is TCP {PORT} of {manager_address} reachable from {host.name}? then run bootstrap again",
        )
    return str(swarm["NodeID"])


# An agent that is still there when the node joins again keeps its old keys: the new one can't listen, all nodes say
# Ready, and no name resolves (seen: "failed to create memberlist: ... address already in use").
_AGENT_GONE = f"""
for i in $(seq 50); do ss -Hltn | grep -q ':{GOSSIP_PORT} ' || exit 0; sleep 0.2; done
systemctl restart docker
"""


def leave(host: Host) -> None:
    """Leave, whatever the state, and wait until the node's gossip agent is gone; else restart Docker, which runs
    no task of a Swarm any more."""
    with host.doing("swarm leave"):
        host.docker.leave_swarm(force=True)
    host.run(_AGENT_GONE, step="wait for the end of the old Swarm's agent", timeout=120)


def _overtaken(error: BaseException) -> bool:
    """What is written was changed since it was read. If that made a node a manager, writing the old role back looks
    like a demotion, and it is refused as one before the version is looked at (swarmkit, controlapi/node.go)."""
    return "out of sequence" in str(error) or "can't find manager in raft memberlist" in str(error)


def unless_overtaken(act: Callable[[], T]) -> T:
    """Docker refuses a write whose version is old ("update out of sequence"): then ``act`` reads and writes again. It
    must be idempotent. The Swarm itself writes, too: how an update of a service goes is a part of the service. An
    election is waited for."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_overtaken),
        stop=tenacity.stop_after_delay(10),
        wait=tenacity.wait_random(0, 0.2),
        reraise=True,
    )
    return patiently(lambda: retrying.copy()(act))


def change_node(manager: Host, node: str, change: Callable[[dict[str, Any]], None], step: str) -> None:
    """Change a node's spec by reading it whole, changing it and writing it back. The change must be idempotent."""
    api = manager.docker

    def once() -> None:
        raw = api.inspect_node(node)
        spec = raw["Spec"]
        spec["Labels"] = dict(spec.get("Labels") or {})
        before = repr(spec)
        change(spec)
        if repr(spec) != before:
            api.update_node(node, raw["Version"]["Index"], spec)

    with manager.doing(step):
        unless_overtaken(once)


def set_role(manager: Host, node: str, role: str) -> None:
    """Promote or demote, and wait until the node is what it shall be: one at a time keeps the majority."""
    change_node(manager, node, lambda spec: spec.update(Role=role), f"make node {node} a {role}")

    def seen() -> dict[str, Any]:
        raw: dict[str, Any] = manager.docker.inspect_node(node)
        return raw

    def there(raw: dict[str, Any]) -> bool:
        reachable = (raw.get("ManagerStatus") or {}).get("Reachability") == "reachable"
        return reachable if role == "manager" else not raw.get("ManagerStatus")

    with manager.doing(f"wait until node {node} is a {role}"):
        wait_until(seen, there, 30, pause=0.1)


def set_label(manager: Host, node: str, name: str, value: str | None) -> None:
    """Set a node label, or remove it (value None)."""

    def change(spec: dict[str, Any]) -> None:
        if value is None:
            spec["Labels"].pop(name, None)
        else:
            spec["Labels"][name] = value

    change_node(manager, node, change, f"label node {node}")


def label_host(manager: Host, node: str, host: str) -> None:
    set_label(manager, node, HOST_LABEL, host)


def forget(manager: Host, node: str) -> None:
    """Remove a node that left from the list; a manager is demoted first, or it would go on to count (F32)."""
    with manager.doing(f"remove node {node}"):
        try:
            raw = manager.docker.inspect_node(node)
        except docker.errors.NotFound:
            return
    if raw["Spec"]["Role"] == "manager":
        change_node(manager, node, lambda spec: spec.update(Role="worker"), f"demote node {node}")
    with manager.doing(f"remove node {node}"):

        def remove() -> None:
            manager.docker.remove_node(node, force=True)

        tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda e: "manager" in str(e)),  # the demotion takes a moment
            stop=tenacity.stop_after_delay(15),
            wait=tenacity.wait_fixed(0.3),
            reraise=True,
        )(remove)


def wait_until(read: Callable[[], T], good: Callable[[T], bool], seconds: float, pause: float = 0.5) -> T:
    """Poll ``read()`` (it must not change anything) until ``good`` of it; the last value after ``seconds``. The pause
    grows up to ``pause`` seconds."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda value: not good(value)),
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_exponential(0.03, max=pause),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    last: T = retry(read)
    return last
