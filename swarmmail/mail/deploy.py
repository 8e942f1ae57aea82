"""Deploy: render the stack, let Docker judge it, show what changes, deploy, and wait until that is what runs."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import docker
import docker.errors
import tenacity
from ruamel.yaml import YAML

from swarmmail import report
from swarmmail.cluster import bootstrap, images, lock, swarm
from swarmmail.hosts.dockerapi import patiently
from swarmmail.hosts.facts import gather
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import services
from swarmmail.mail.services import Seen
from swarmmail.model import content
from swarmmail.model import stack as model
from swarmmail.model.bootstrap import Observed, silent
from swarmmail.model.errors import Deadline, HostError, InputError, Refused, Unreachable
from swarmmail.model.inventory import Inventory
from swarmmail.model.move import JOURNAL
from swarmmail.model.patience import patient
from swarmmail.model.placement import LIVE, Place, place
from swarmmail.model.stack import Filling, Service, StackFile, first_host
from swarmmail.model.swarm import PLACED

STACK_OBJECT = "swarmmail.stack"
"""Label on configs and secrets that we made: the stack they belong to."""
LOST_LINK = "error creating vxlan interface: file exists"
"""Docker puts the link of an overlay back into the host when it gives the overlay up; killed then, it leaves it there,
and the overlay's number is taken (seen with 26.1; moby/libnetwork#945)."""
START_LIMIT = patient(120)  # seconds for all tasks to run and be healthy
SETTLES = 5
"""Seconds within which the Swarm acts on a constraint that does not hold any more, or on a node that came back."""
FAILED = ("failed", "rejected")
PORT_TAKEN = "port is already allocated"
"""Docker's words when a container there has the port: the service's own, which is stopping. The Swarm tries again."""
PORT_PATIENCE = model.MAX_GRACE + 5
"""Seconds that the task before may take to stop and free its port."""
_FENCE = resources.files(__package__).joinpath("fence.sh").read_bytes()


@dataclass(frozen=True)
class Change:
    """One thing that deploy would do, with the lines that people compare."""

    what: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What deploy has to do, and what it needs for it."""

    stack: StackFile
    seen: Seen
    places: Mapping[str, Place]
    rendered: Mapping[str, Any]
    build: tuple[Service, ...]
    ship: Mapping[str, tuple[str, ...]]
    """Service to the hosts that lack its image."""
    files: Mapping[tuple[str, str], bytes]
    """Configs and secrets to make: (kind, name) to content."""
    services: tuple[str, ...]
    """Services to create or update."""
    remove: tuple[str, ...]
    changes: tuple[Change, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        return not self.changes


def run(fleet: Fleet) -> Seen | None:
    """Deploy: the services and tasks that run now (hosts and nodes as they were before); None when there was nothing
    to do.

    Raises:
        InputError: the stack file or the inventory is wrong; nothing was touched.
        Refused: the wanted state contradicts where data is, or a port is taken.
        SwarmmailError: a step failed, or a task does not run what was asked.
    """
    stack = check(fleet.inventory)
    plan = decide(fleet, stack)
    for note in plan.notes:
        report.progress(note)
    if plan.is_empty:
        _wait(fleet, stack, plan)
        return None
    show(plan)
    with lock.held(plan.seen.manager, "deploy", swarm=True):
        return apply(fleet, stack, plan)


def check(inventory: Inventory) -> StackFile:
    """The stack file, and all that can be judged of it without a host. Raises InputError."""
    stack = model.read(inventory)
    _secrets(inventory, stack)
    return stack


def show(plan: Plan) -> None:
    for change in plan.changes:
        report.result(f"+ {change.what}")
        for line in change.lines:
            report.result(f"    {line}")


def decide(
    fleet: Fleet,
    stack: StackFile,
    built: Mapping[str, images.ImageInfo] | None = None,
    before: Observed | None = None,
) -> Plan:
    """Observe and compare. ``built``: images that were just built, by tag. ``before``: what was observed a moment ago,
    when nothing was changed since but images; then only the Swarm is read anew."""
    inventory = fleet.inventory
    assert inventory.stack is not None
    if before is None:
        for name in set(inventory.stack.placement.values()):
            fleet[name].open_docker()  # asked for images below
    seen = services.observe(fleet, bootstrap.look_again(fleet, before) if before is not None else None)
    if inventory.network.name not in seen.swarm.networks:
        raise Refused(f"there is no overlay {inventory.network.name}", step="deploy", hint="run: fab bootstrap")
    _no_move(seen)
    for name in silent(seen.observed.hosts):
        raise HostError("Docker does not answer", host=name, step="deploy", hint="run: fab bootstrap")
    notes = _silent_hosts(inventory.stack.placement, seen)
    unlabelled = [name for name in inventory.hosts if seen.swarm.node_of(name) is None]
    if unlabelled:
        raise Refused(f"{', '.join(unlabelled)} is not in the Swarm", step="deploy", hint="run: fab bootstrap")
    places = {
        name: place(inventory.cluster, stack, service, first, seen.observed.hosts, seen.swarm)
        for name, service in stack.services.items()
        if (first := first_host(service, inventory))
    }
    _ports_free(fleet, stack, seen, places)
    answering = [name for name, facts in seen.observed.hosts.items() if not facts.unreachable]
    targets = {name: [places[name].host] if name in places else answering for name in stack.services}
    known, missing = _images(fleet, stack, targets)
    known = {**(built or {}), **known}
    to_build = tuple(
        service for service in stack.services.values() if service.build is not None and service.image not in known
    )
    there = inventory.stack.build  # an image that is built on a host is there
    missing = {
        name: [host for host in hosts if host != there or stack.services[name] not in to_build]
        for name, hosts in missing.items()
    }
    commands = {name: _command(service, known.get(service.image), seen) for name, service in stack.services.items()}
    files, secrets, configs = _files(inventory, stack)
    filling = Filling(commands, {n: _generation(n, p, seen) for n, p in places.items()}, secrets, configs)
    rendered = model.render(stack, inventory, filling)
    canonical = _canonical(fleet, stack, seen, rendered)
    rendered = model.label_specs(rendered, canonical)
    changes: list[Change] = []
    changes += [Change(f"build {service.image}") for service in to_build]
    changes += [
        Change(f"bring image {stack.services[name].image} to {', '.join(hosts)}")
        for name, hosts in missing.items()
        if hosts
    ]
    for name, where in places.items():
        if where.new:
            volumes = ", ".join(stack.volume_name(volume) for volume in stack.services[name].volumes)
            changes.append(Change(f"make volume {volumes} on {where.host}, generation {where.generation}"))
        elif where.label:
            why = "has its data there" if stack.services[name].volumes else "is bound to it"
            changes.append(Change(f"label the node of {where.host}: {name} {why}"))
    existing = _objects(seen)
    files = {key: data for key, data in files.items() if key not in existing}
    changes += [Change(f"make {kind} {name}") for kind, name in files]
    to_deploy = []
    for name in stack.services:
        wanted = model.wanted_view(stack, rendered, canonical, name)
        if name not in seen.services:
            changes.append(Change(f"create service {stack.name}_{name} ({stack.services[name].image})"))
            to_deploy.append(name)
        elif lines := model.differences(model.seen_view(seen.services[name], seen.networks), wanted):
            changes.append(Change(f"update service {stack.name}_{name}", tuple(lines)))
            to_deploy.append(name)
    remove = tuple(name for name in seen.services if name not in stack.services)
    changes += [Change(f"remove service {stack.name}_{name} (its volumes stay)") for name in remove]
    return Plan(
        stack=stack,
        seen=seen,
        places=places,
        rendered=rendered,
        build=to_build,
        ship={name: tuple(hosts) for name, hosts in missing.items() if hosts},
        files=files,
        services=tuple(to_deploy),
        remove=remove,
        changes=tuple(changes),
        notes=(*notes, *(where.note for where in places.values() if where.note)),
    )


def _no_move(seen: Seen) -> None:
    """During a move a service is on two nodes, by design."""
    with seen.manager.doing("look for a move"):
        found = seen.manager.docker.configs(filters={"name": JOURNAL})
    if any(raw["Spec"]["Name"] == JOURNAL for raw in found):
        raise Refused(
            "a service is being moved, or its move was interrupted", step="deploy", hint="see: fab migrate.status"
        )


def _silent_hosts(placement: Mapping[str, str], seen: Seen) -> list[str]:
    """Hosts that do not answer: nothing can be said of data there, so a service that is bound to one stops deploy."""
    notes = []
    for name, facts in seen.observed.hosts.items():
        if facts.unreachable:
            node = seen.swarm.node_of(name)
            if (node is not None and node.places) or name in placement.values():
                raise Unreachable(
                    facts.unreachable, host=name, step="ssh", hint="it has, or shall have, a service of the stack"
                )
            notes.append(f"{name} does not answer ({facts.unreachable}); deploy goes on without it")
    return notes


def _generation(name: str, where: Place, seen: Seen) -> int:
    """The lowest generation that may live. What a service has already is kept: raising it restarts the task."""
    raw = seen.services.get(name)
    if raw is not None:
        env = model.pairs(raw["Spec"]["TaskTemplate"]["ContainerSpec"].get("Env"))
        given = env.get("SWARMMAIL_GENERATION", "")
        if given.isdigit() and int(given) > where.generation:
            raise Refused(
                f"its volume is an old copy: generation {where.generation}, the service wants {given}",
                host=where.host,
                step=f"place {name}",
                hint="bring the newer copy back; see: fab status",
            )
        if given.isdigit():
            return int(given)
    return where.generation


def _ports_free(fleet: Fleet, stack: StackFile, seen: Seen, places: Mapping[str, Place]) -> None:
    for name, where in places.items():
        runs_there = any(
            seen.host_of(task) == where.host and task["Status"]["State"] == "running"
            for task in seen.tasks.get(name, ())
        )
        if runs_there:
            continue
        wanted = set(stack.services[name].ports)
        taken = sorted(wanted & seen.observed.hosts[where.host].listening)
        if taken:
            taken = _still_taken(fleet, stack, where.host, name, wanted)
        if taken:
            raise Refused(
                f"port {', '.join(map(str, taken))} is taken by another program",
                host=where.host,
                step=f"place {name}",
                hint=f"see which on that host: ss -ltnp 'sport = :{taken[0]}'; stop it, then deploy again",
            )


def _still_taken(fleet: Fleet, stack: StackFile, host: str, service: str, ports: set[int]) -> list[int]:
    """A container of ours that has just ended may have had them: its ports are free a moment after it is gone."""
    found: list[int] = tenacity.Retrying(
        retry=tenacity.retry_if_result(bool),
        stop=tenacity.stop_after_delay(8),
        wait=tenacity.wait_fixed(1),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else [],
    )(lambda: [] if _own_container(fleet, stack, host, service) else sorted(ports & gather(fleet[host]).listening))
    return found


def _own_container(fleet: Fleet, stack: StackFile, host: str, service: str) -> bool:
    """Whether the service's own container is still there: it is stopping, or its service was removed by hand."""
    with fleet[host].doing("look for containers"):
        label = f"com.docker.swarm.service.name={stack.name}_{service}"
        return bool(fleet[host].docker.containers(filters={"label": label}))


def _images(
    fleet: Fleet, stack: StackFile, targets: Mapping[str, list[str]]
) -> tuple[dict[str, images.ImageInfo], dict[str, list[str]]]:
    """Images that are known by their tag, and for each service the hosts that lack it."""
    known: dict[str, images.ImageInfo] = {}
    missing: dict[str, list[str]] = {}
    for name, service in stack.services.items():
        for host in targets[name]:
            with fleet[host].doing("look for images"):
                info = images.inspect(fleet[host].docker, service.image)
            if info is None:
                missing.setdefault(name, []).append(host)
            else:
                known[service.image] = info
    lacking = [stack.services[name] for name in missing if stack.services[name].image not in known]
    if lacking:
        assert fleet.inventory.stack is not None
        where = images.builder(fleet, fleet.inventory.stack.build)
        for service in lacking:
            info = images.inspect(where.api, service.image)
            if info is not None:
                known[service.image] = info
            elif service.build is None:
                raise Refused(
                    f"image {service.image} is neither on its host nor on {where.name}",
                    step=f"image of {service.name}",
                    hint=f"docker pull {service.image} on one of them",
                )
    return known, missing


def _command(service: Service, image: images.ImageInfo | None, seen: Seen) -> tuple[str, ...]:
    """What the container runs behind the fence (Compose: an entrypoint in the file drops the image's command)."""
    if image is None:
        raw = seen.services.get(service.name)
        return tuple(raw["Spec"]["TaskTemplate"]["ContainerSpec"].get("Args") or ()) if raw is not None else ()
    entrypoint = service.entrypoint if service.entrypoint is not None else image.entrypoint
    inherited = image.command if service.entrypoint is None else ()
    return (*entrypoint, *(service.command if service.command is not None else inherited))


def _files(
    inventory: Inventory, stack: StackFile
) -> tuple[dict[tuple[str, str], bytes], dict[str, str], dict[str, str]]:
    """Configs and secrets: contents, and the names by content of those that the stack file uses."""
    files: dict[tuple[str, str], bytes] = {}
    secrets: dict[str, str] = {}
    for name, data in _secrets(inventory, stack).items():
        secrets[name] = f"{stack.name}_{name}_{content.digest(data)}"
        files[("secret", secrets[name])] = data
    fence = f"{stack.name}_fence_{content.digest(_FENCE)}"
    files[("config", fence)] = _FENCE
    return files, secrets, {model.FENCE: fence}


def _secrets(inventory: Inventory, stack: StackFile) -> dict[str, bytes]:
    """The secrets that the stack file uses, from the files that the inventory names."""
    used = [name for name in model.SECRETS if name in (stack.document.value.get("secrets") or {})]
    tls = inventory.stack.tls if inventory.stack is not None else None
    if used and tls is None:
        raise InputError([f"{inventory.path}: stack.tls: missing; {stack.path} uses the secret {used[0]}"])
    if used:
        _check_pair(inventory, tls)
    return {name: getattr(tls, model.SECRETS[name]).read_bytes() for name in used}


def _check_pair(inventory: Inventory, tls: Any) -> None:
    """Postfix and Dovecot would start with a certificate that is not the key's, and refuse every client."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise InputError(
            [f"{inventory.path}: stack.tls: {tls.certificate.name} and {tls.key.name} are no pair: {reason}"]
        ) from None


def _objects(seen: Seen) -> set[tuple[str, str]]:
    with seen.manager.doing("read configs and secrets"):
        api = seen.manager.docker
        return {("config", raw["Spec"]["Name"]) for raw in api.configs()} | {
            ("secret", raw["Spec"]["Name"]) for raw in api.secrets()
        }


def _settings(fleet: Fleet) -> str:
    assert fleet.inventory.stack is not None
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in fleet.inventory.stack.settings.items())


def _canonical(fleet: Fleet, stack: StackFile, seen: Seen, rendered: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Docker makes of the rendered file. Raises InputError with Docker's own words when it refuses."""
    result = seen.manager.run(
        f"{_settings(fleet)} docker stack config -c -",
        stdin=json.dumps(rendered),
        step="docker stack config",
        check=False,
    )
    if not result.ok:
        words = " ".join(result.stderr.split())
        raise InputError([f"{stack.path}: docker stack config on {seen.manager.name} says: {words}"])
    value: Mapping[str, Any] = YAML(typ="safe", pure=True).load(result.stdout)
    return value


# ---- doing ----


def apply(fleet: Fleet, stack: StackFile, plan: Plan) -> Seen:
    """Every step may be done twice: what is there is left. So a run that was killed is finished by the next.
    Returns the services and tasks at the end."""
    assert fleet.inventory.stack is not None
    before = _failed(plan.seen)
    if plan.build or plan.ship:
        where = images.builder(fleet, fleet.inventory.stack.build)
        built = {service.image: images.build(where, _folder(service), service.image) for service in plan.build}
        images.ship(fleet, where, {stack.services[name].image: hosts for name, hosts in plan.ship.items()})
        plan = decide(fleet, stack, built, plan.seen.observed)  # only now it is known what the images run
    for name, where_to in plan.places.items():
        if where_to.new:
            _make_volumes(fleet, stack, stack.services[name], where_to, plan.seen)
        if where_to.label:
            node = plan.seen.swarm.node_of(where_to.host)
            assert node is not None
            swarm.set_label(plan.seen.manager, node.id, stack.services[name].place_label, PLACED)
    _make_files(plan)
    for name in plan.remove:
        with plan.seen.manager.doing(f"remove service {name}"), contextlib.suppress(docker.errors.NotFound):
            plan.seen.manager.docker.remove_service(plan.seen.services[name]["ID"])
    for name in plan.services:
        _remove_other_mode(fleet, stack, plan, name)
    if plan.services:
        # only what differs: Docker would write every service of the file anew, changed or not
        document = {**plan.rendered, "services": {name: plan.rendered["services"][name] for name in plan.services}}
        report.progress(f"docker stack deploy {stack.name}", plan.seen.manager.name)
        swarm.unless_overtaken(
            lambda: plan.seen.manager.run(
                f"{_settings(fleet)} docker stack deploy --detach=true --resolve-image never -c - {stack.name}",
                stdin=json.dumps(document),
                step="docker stack deploy",
                timeout=120,
            )
        )
    seen = _wait(fleet, stack, plan, before)
    _prune(plan)
    for name, where_to in plan.places.items():
        if stack.services[name].build is not None:
            images.prune(fleet[where_to.host], stack.services[name].image)
    return seen


def _remove_other_mode(fleet: Fleet, stack: StackFile, plan: Plan, name: str) -> None:
    """The Swarm refuses to change a service between `replicated` and `global`: it is made anew, its volumes stay."""
    raw = plan.seen.services.get(name)
    wanted = (plan.rendered["services"][name].get("deploy") or {}).get("mode", "replicated")
    if raw is None or wanted.title() in (raw["Spec"].get("Mode") or {}):
        return
    with plan.seen.manager.doing(f"remove service {name}"), contextlib.suppress(docker.errors.NotFound):
        plan.seen.manager.docker.remove_service(raw["ID"])
    hosts = [host for host, facts in plan.seen.observed.hosts.items() if not facts.unreachable]

    def alone() -> bool:
        return not any(_own_container(fleet, stack, host, name) for host in hosts)

    if not swarm.wait_until(alone, bool, PORT_PATIENCE):
        raise Deadline(f"{name} did not stop in {PORT_PATIENCE} s", step="deploy", hint="see: fab status")


def _folder(service: Service) -> Any:
    assert service.build is not None
    return service.build


# What is in a volume is a container's to write: no link is followed, and the marker is made outside of the volume.
_MARK = """
found=$(ls -A | grep -v "^[.]swarmmail-volume" | head -1)
if [ -n "$found" ] && { [ ! -f .swarmmail-volume ] || [ -L .swarmmail-volume ]; }; then
  echo "holds $found and has no marker" >&2; exit 3
fi
@OWN@
made=$(mktemp ../.swarmmail.XXXXXX) || exit 1
{ cat >"$made" && chmod 644 "$made" && sync "$made" && mv -fT "$made" .swarmmail-volume && sync .; } ||
  { rm -f "$made"; exit 1; }
"""


def _make_volumes(fleet: Fleet, stack: StackFile, service: Service, where: Place, seen: Seen) -> None:
    """Make the volumes with their markers. A volume that holds anything else is somebody's data: refused."""
    host = fleet[where.host]
    node = seen.swarm.node_of(where.host)
    assert node is not None
    owner = service.user if service.user.replace(":", "").isdigit() else ""
    for volume in service.volumes:
        name = stack.volume_name(volume)
        labels = {
            model.STACK_LABEL: stack.name,
            "swarmmail.cluster": fleet.inventory.cluster,
            "swarmmail.service": service.name,
        }
        with host.doing(f"make volume {name}"):
            folder = host.docker.create_volume(name, labels=labels)["Mountpoint"]
        marker = "\n".join(
            (
                f"cluster={fleet.inventory.cluster}",
                f"service={service.name}",
                f"generation={where.generation}",
                f"node={node.id}",
                f"state={LIVE}",
                "",
            )
        )
        own = f"chown {owner} ." if owner else ":"
        script = f"cd {shlex.quote(folder)} || exit 1\n{_MARK.replace('@OWN@', own)}"
        result = host.run(script, stdin=marker, step=f"make volume {name}", check=False)
        if result.status == 3:
            raise Refused(
                f"volume {name} {result.stderr.strip()}: it may be somebody's data",
                host=host.name,
                step=f"make volume {name}",
                hint=f"look into it; if it is not needed: docker volume rm {name} on that host",
            )
        if not result.ok:
            raise HostError(result.stderr.strip() or "failed", host=host.name, step=f"make volume {name}")


def _make_files(plan: Plan) -> None:
    api = plan.seen.manager.docker
    for (kind, name), data in plan.files.items():
        make = api.create_config if kind == "config" else api.create_secret
        with plan.seen.manager.doing(f"make {kind} {name}"):
            try:
                patiently(functools.partial(make, name, data, labels={STACK_OBJECT: plan.stack.name}))
            except docker.errors.APIError as error:
                if "already exists" not in str(error):
                    raise


def _prune(plan: Plan) -> None:
    """Remove configs and secrets of ours that nothing uses; the Swarm itself refuses those in use."""
    api, manager = plan.seen.manager.docker, plan.seen.manager
    label = {"label": f"{STACK_OBJECT}={plan.stack.name}"}
    with manager.doing("remove old configs and secrets"):
        running = api.services(filters={"label": f"{model.STACK_LABEL}={plan.stack.name}"})
        using = json.dumps([raw["Spec"] for raw in running])
        for found, remove in ((api.configs, api.remove_config), (api.secrets, api.remove_secret)):
            for raw in found(filters=label):
                if raw["ID"] not in using:
                    with contextlib.suppress(docker.errors.APIError):
                        remove(raw["ID"])


# ---- waiting: what counts is the running task, not the CLI's exit status (docker/cli#6752) ----


def _has_just_changed(seen: Seen) -> bool:
    """Whether a task that took another's place changed its state less than 20 s ago, by the manager's own clock."""
    now = seen.observed.hosts[seen.manager.name].clock
    times = [task["Status"]["Timestamp"][:19] for tasks in seen.tasks.values() for task in tasks if len(tasks) > 1]
    return any(now - datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() < 20 for text in times)


@dataclass
class _Trouble:
    """What was seen while waiting: tasks that failed, and since when (monotonic seconds) others have no node."""

    before: frozenset[str] = frozenset()
    """Tasks that had failed before anything was done: they say nothing of what is new."""
    failed: set[str] = field(default_factory=set)
    pending: dict[str, float] = field(default_factory=dict)


def _failed(seen: Seen) -> frozenset[str]:
    return frozenset(t["ID"] for tasks in seen.tasks.values() for t in tasks if t["Status"]["State"] in FAILED)


def _wait(fleet: Fleet, stack: StackFile, plan: Plan, before: frozenset[str] | None = None) -> Seen:
    """Wait until each service's container on its host runs the wanted image and is healthy; what was seen then.

    Raises:
        HostError: a task can't start; with the scheduler's own words and the container's last lines.
        Deadline: not within the limit.
    """
    deadline = time.monotonic() + START_LIMIT
    trouble = _Trouble(before=_failed(services.observe(fleet, plan.seen.observed)) if before is None else before)
    pause = 0.05
    ready_since: float | None = None
    # A label that came back, or a node: the Swarm may still be about to stop a task that looks well.
    back = any(place.label and not place.new and name in plan.seen.services for name, place in plan.places.items())
    settle = SETTLES if back or (plan.is_empty and _has_just_changed(plan.seen)) else 0
    while True:
        seen = services.observe(fleet, plan.seen.observed)
        missing = {name: _missing(fleet, stack, seen, name, trouble) for name in stack.services}
        if any(missing.values()):
            ready_since = None
        elif ready_since is None:
            ready_since = time.monotonic()
        if ready_since is not None and time.monotonic() - ready_since >= settle:
            return seen
        if time.monotonic() > deadline:
            waiting = ", ".join(f"{name}: {what}" for name, what in missing.items() if what)
            raise Deadline(
                f"not running after {START_LIMIT:g} s: {waiting}",
                step="deploy",
                hint="see: fab status; then fab deploy",
            )
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)


def _missing(fleet: Fleet, stack: StackFile, seen: Seen, name: str, trouble: _Trouble) -> str:
    """What keeps a service from running as it should; empty when nothing does."""
    raw = seen.services.get(name)
    if raw is None:
        return "no such service"
    wanted = raw["Spec"]["TaskTemplate"]["ContainerSpec"]
    current = [task for task in seen.tasks[name] if task["Spec"]["ContainerSpec"] == wanted]
    if not current:
        return "no task yet"
    for task in current:
        failed = task["Status"]["State"] in FAILED and PORT_TAKEN not in str(task["Status"].get("Err", ""))
        if failed and task["ID"] not in trouble.before:
            trouble.failed.add(task["ID"])
    alive = [task for task in current if task["DesiredState"] in ("ready", "running")]
    newest = alive[0] if alive else current[0]
    status, host = newest["Status"], seen.host_of(newest)
    state = str(status["State"])
    problem = str(status.get("Err", ""))
    bad = [task for task in current if task["ID"] in trouble.failed]
    if any(task["Status"]["State"] == "rejected" for task in bad) or len(bad) > 1:
        raise _cannot_start(fleet, seen, name, bad[0])
    if state == "pending" and "no suitable node" in problem:
        # a port of the Swarm is free again when the task before has stopped; nothing else heals by itself
        patience = PORT_PATIENCE if "port already in use" in problem else 3
        if time.monotonic() - trouble.pending.setdefault(newest["ID"], time.monotonic()) > patience:
            raise HostError(problem, step=f"start {name}", hint="see: fab status")
    if state != "running" or not alive:
        return f"its task is {state} {problem}".strip()
    container = (status.get("ContainerStatus") or {}).get("ContainerID")
    if not container or host not in fleet.inventory.hosts:
        return "running on a host that is not in the inventory"
    with fleet[host].doing(f"look at {name}"):
        try:
            there = fleet[host].docker.inspect_container(container)
        except docker.errors.NotFound:
            return "its container has just gone"
        image = images.inspect(fleet[host].docker, stack.services[name].image)
    if image is None or there["Image"] != image.id:
        return "runs another image"
    health = (there["State"].get("Health") or {}).get("Status", "healthy")
    return "" if health == "healthy" and there["State"]["Running"] else f"its task is running, {health}"


def _cannot_start(fleet: Fleet, seen: Seen, name: str, task: Mapping[str, Any]) -> HostError:
    host = seen.host_of(task)
    words = str(task["Status"].get("Err", "")) or str(task["Status"].get("Message", ""))
    container = (task["Status"].get("ContainerStatus") or {}).get("ContainerID")
    if container and host in fleet.inventory.hosts:
        logs = fleet[host].run(f"docker logs --tail 5 {container} 2>&1", step="read its log", check=False, timeout=20)
        lines = [line.strip() for line in logs.stdout.splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith("swarmmail: ")), lines[-1] if lines else "")
        words += f"; it said: {said}" if said else ""
    hint = "mend it, then run: fab deploy"
    if LOST_LINK in words:
        hint = f"a link vx-... that Docker lost is left on {host} (ip -br link): ip link del it, then run: fab deploy"
    return HostError(words, host=host or None, step=f"start {name}", hint=hint)
