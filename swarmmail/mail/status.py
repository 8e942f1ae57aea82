"""One screen: nodes, services, volumes, queue."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from swarmmail import report
from swarmmail.cluster import bootstrap
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import services
from swarmmail.mail.services import Seen
from swarmmail.model.errors import SwarmmailError
from swarmmail.model.facts import HostFacts


def collect(fleet: Fleet) -> dict[str, Any]:
    """The state as plain data: keys ``cluster``, ``nodes``, ``services``, ``volumes``, ``queue``."""
    seen = services.observe(fleet)
    silent = [f"{name} does not answer: {f.unreachable}" for name, f in seen.observed.hosts.items() if f.unreachable]
    encryption, why, pending = "unknown", "; ".join(silent), silent
    if not silent:
        try:
            design, plan = bootstrap.decide(fleet.inventory, seen.observed)
            encryption, why = design.encryption, design.why
            pending = [f"{step.host}: {step.text} -> run: fab bootstrap" for step in plan.steps] + list(plan.waits)
        except SwarmmailError as error:  # the wanted state can't be reached: what is there is shown all the same
            why, pending = str(error), [str(error)]
    return {
        "cluster": fleet.inventory.cluster,
        "encryption": {"configured": encryption, "why": why, "measured": None},
        "pending": pending,
        "nodes": [_node(seen, name, facts) for name, facts in seen.observed.hosts.items()],
        "services": [_service(fleet, seen, name) for name in sorted(seen.services)],
        "volumes": _volumes(fleet, seen),
        "queue": _queue(fleet, seen),
    }


def _node(seen: Seen, name: str, facts: HostFacts) -> dict[str, Any]:
    node = seen.swarm.node_of(name)
    return {
        "host": name,
        "role": (node.role + (" (leader)" if node.leader else "")) if node is not None else "not in the Swarm",
        "state": (node.state if node is not None else facts.swarm) + (", no SSH" if facts.unreachable else ""),
        "availability": node.availability if node is not None else "",
        "engine": facts.engine,
        "address": node.address if node is not None else "",
        "tunnel": facts.mesh.address,
        "guarded": facts.mesh.guarded,
    }


def _service(fleet: Fleet, seen: Seen, name: str) -> dict[str, Any]:
    raw = seen.services[name]
    wanted = raw["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]
    live = seen.live(name)
    tasks = sorted(seen.tasks[name], key=lambda task: seen.host_of(task) not in live)  # stable; a standby comes last
    task = next((task for task in tasks if task["DesiredState"] == "running"), None)
    entry: dict[str, Any] = {"service": name, "image": wanted, "host": "", "state": "no task", "since": "", "note": ""}
    if task is None:
        return entry
    status = task["Status"]
    container = (status.get("ContainerStatus") or {}).get("ContainerID")
    entry.update(host=seen.host_of(task), state=status["State"], since=status["Timestamp"], note=status.get("Err", ""))
    facts = seen.observed.hosts.get(entry["host"])
    if facts is not None and facts.unreachable:
        entry["note"] = "its host does not answer"
    elif facts is not None and not facts.engine:
        entry["note"] = "Docker does not answer there"
    elif facts is not None and status["State"] == "running" and container:
        host = fleet[entry["host"]]
        with host.doing(f"look at {name}"):
            health = host.docker.inspect_container(container)["State"].get("Health") or {}
        entry["state"] = health.get("Status", "running")
    return entry


def _volumes(fleet: Fleet, seen: Seen) -> list[dict[str, Any]]:
    """Every volume with a marker, on every host: also copies that are not live."""

    def sizes(name: str) -> dict[str, int]:
        if not seen.observed.hosts[name].markers or not seen.observed.hosts[name].engine:
            return {}
        words = fleet[name].run(
            "cd $(docker info --format '{{.DockerRootDir}}')/volumes && "
            'for m in */_data/.swarmmail-volume; do v=${m%%/*}; echo "$v $(du -sk "$v/_data" | cut -f1)"; done',
            step="measure volumes",
            timeout=60,
        )
        return {parts[0]: int(parts[1]) * 1024 for line in words.stdout.splitlines() if len(parts := line.split()) == 2}

    measured = fleet.each(lambda host: sizes(host.name))
    return [
        {
            "volume": marker.volume,
            "host": name,
            "service": marker.service,
            "generation": marker.generation,
            "state": marker.state if marker.cluster == fleet.inventory.cluster else f"of cluster {marker.cluster}",
            "bytes": measured[name].get(marker.volume),
        }
        for name, facts in seen.observed.hosts.items()
        for marker in facts.markers
    ]


def _queue(fleet: Fleet, seen: Seen) -> dict[str, Any]:
    """Messages by queue, as postqueue(1) lists them; ``error`` when the MTA can't be asked."""
    try:
        mta = services.running(fleet, seen, "mta")
        listed = mta.exec("postqueue -j", step="read the queue").stdout
    except SwarmmailError as error:
        return {"error": str(error)}
    import json

    counts: dict[str, int] = {}
    for line in listed.splitlines():
        if line.strip():
            queue = json.loads(line)["queue_name"]
            counts[queue] = counts.get(queue, 0) + 1
    return {"messages": sum(counts.values()), **counts}


def _age(timestamp: str) -> str:
    if not timestamp:
        return ""
    then = datetime.fromisoformat(timestamp[:19]).replace(tzinfo=UTC)
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def show(state: dict[str, Any]) -> None:
    configured = state["encryption"]
    report.result(
        f"cluster {state['cluster']}, configured encryption: {configured['configured']} ({configured['why']})"
    )
    report.table(
        "nodes",
        ["host", "role", "state", "engine", "swarm address", "tunnel", "guard"],
        [
            (
                n["host"],
                n["role"],
                n["state"] + (f", {n['availability']}" if n["availability"] not in ("", "active") else ""),
                n["engine"],
                n["address"],
                n["tunnel"] or "-",
                "in force" if n["guarded"] else "-",
            )
            for n in state["nodes"]
        ],
    )
    report.table(
        "services",
        ["service", "host", "state", "for", "image", "note"],
        [(s["service"], s["host"], s["state"], _age(s["since"]), s["image"], s["note"]) for s in state["services"]],
    )
    report.table(
        "volumes",
        ["volume", "host", "service", "generation", "state", "size"],
        [
            (v["volume"], v["host"], v["service"], str(v["generation"]), v["state"], _size(v["bytes"]))
            for v in state["volumes"]
        ],
    )
    queue = state["queue"]
    report.result(f"queue: {queue['error']}" if "error" in queue else f"queue: {queue['messages']} messages")
    for line in state["pending"]:
        report.warning(line)
