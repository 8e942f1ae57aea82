"""The stack file: judged, rendered for the Swarm, and compared with what runs. Pure.

The file is a plain Compose file. What is added when it is rendered: content-hashed tags, configs and secrets; the
placement by node label; the fence around each command; the environment that the fence reads.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmmail.model import content, yamlfile
from swarmmail.model.errors import InputError
from swarmmail.model.inventory import Inventory
from swarmmail.model.swarm import PLACE_LABEL, PLACED

ROLE_LABEL = "swarmmail.role"
ROLES = ("mta", "mda", "edge")
SPEC_LABEL = "swarmmail.spec"
"""On a service: hash of the rendered service that it was deployed from."""
STACK_LABEL = "com.docker.stack.namespace"
FENCE = "swarmmail-fence"
FENCE_PATH = "/swarmmail-fence"
FILE = "stack.yml"
SECRETS = {"tls-certificate": "certificate", "tls-key": "key"}
"""Secrets of the stack file that are filled from ``stack.tls`` of the inventory."""
MAX_GRACE = 55
"""Seconds: above a minute the Swarm starts the next task beside the one that is still stopping (moby#36111)."""

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Service:
    """A service of the stack file, as far as the tool must know it."""

    name: str
    role: str
    image: str
    """With its tag: the one of the file, or the content's hash when it is built here."""
    build: Path | None
    volumes: Mapping[str, str]
    """Volume (as named in the file) to mount path."""
    user: str
    ports: tuple[int, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None

    @property
    def place_label(self) -> str:
        return PLACE_LABEL + self.name


@dataclass(frozen=True)
class StackFile:
    """A stack file that was read and found good."""

    name: str
    document: yamlfile.Document
    services: Mapping[str, Service]

    @property
    def path(self) -> Path:
        return self.document.path

    def volume_name(self, volume: str) -> str:
        """The name that Docker gives it (Compose: the stack's name in front, unless ``name`` is set)."""
        spec = (self.document.value.get("volumes") or {}).get(volume) or {}
        return str(spec.get("name") or f"{self.name}_{volume}")

    def by_role(self, role: str) -> Service | None:
        return next((service for service in self.services.values() if service.role == role), None)


def read(inventory: Inventory) -> StackFile:
    """Read and judge the stack file of an inventory.

    Raises:
        InputError: with every problem, each with file, line and key.
    """
    stack = inventory.stack
    if stack is None:
        raise InputError([f"{inventory.path}: no section 'stack': nothing to deploy"])
    document = yamlfile.read(stack.path / FILE)
    value = document.value
    problems: list[str] = []

    def wrong(place: Path_, text: str) -> None:
        problems.append(document.problem(place, text))

    raw_services = value.get("services") if isinstance(value, dict) else None
    if not isinstance(raw_services, dict) or not raw_services:
        raise InputError([document.problem((), "no services: write them below 'services:'")])
    _shape(value, wrong)
    if problems:
        raise InputError(problems)
    services = {}
    for name, raw in raw_services.items():
        before = len(problems)
        _judge(name, raw, value, inventory.network.name, wrong)
        if len(problems) == before:
            services[name] = _service(name, raw, stack.path, stack.name)
            _judge_files(services[name], raw, document, problems)
            if first_host(services[name], inventory):
                _judge_bound(services[name], raw, wrong)
    for service in services.values():
        if service.volumes and service.name not in stack.placement:
            problems.append(
                f"{inventory.path}: stack.placement: service '{service.name}' has data and no host to begin on; "
                f"write {service.name}: {inventory.lead.name} (or another host)"
            )
    for name in stack.placement:
        if name not in raw_services:
            hint = yamlfile.did_you_mean(name, list(raw_services))
            problems.append(
                f"{inventory.path}: stack.placement: '{name}' is no service of {document.path}"
                + (f"; {hint}" if hint else "")
            )
    for role in ROLES:
        having = [s.name for s in services.values() if s.role == role]
        if len(having) > 1:
            wrong(("services",), f"services {', '.join(having)} all have the role {role}; one can")
    for place, name in _variables(value, ()):
        if name not in stack.settings:
            hint = yamlfile.did_you_mean(name, list(stack.settings))
            wrong(place, f"${{{name}}} is not in stack.settings of {inventory.path}" + (f"; {hint}" if hint else ""))
    if problems:
        raise InputError(problems)
    return StackFile(stack.name, document, services)


_MAPPING, _LIST, _EITHER, _WORDS = ("a mapping",), ("a list",), ("a mapping", "a list"), ("text", "a list")
_SHAPES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    **{(section,): _MAPPING for section in ("networks", "volumes", "secrets", "configs")},
    **{(section, "*"): _MAPPING for section in ("services", "networks", "volumes", "secrets", "configs")},
    **{("services", "*", key): _LIST for key in ("ports", "volumes", "secrets", "configs")},
    **{("services", "*", key): _EITHER for key in ("networks", "environment")},
    **{("services", "*", key): _WORDS for key in ("entrypoint", "command")},
    ("services", "*", "build"): ("text", "a mapping"),
    ("services", "*", "deploy"): _MAPPING,
    ("services", "*", "deploy", "labels"): _EITHER,
    **{("services", "*", "deploy", key): _MAPPING for key in ("placement", "update_config", "rollback_config")},
    ("services", "*", "deploy", "placement", "constraints"): _LIST,
}
"""Key path to what may stand there (or nothing); ``*`` is any name. Only what is read here: Docker judges the rest."""


def _shape(value: Any, wrong: Any) -> None:
    for path, allowed in _SHAPES.items():
        for place, found in _at(value, path, ()):
            if found is None and path != ("services", "*"):
                continue
            kinds: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
            if kinds.get(type(found)) not in allowed:
                wrong(place, f"found {yamlfile.short(found)}, allowed: {' or '.join(allowed)}")


def _at(value: Any, path: tuple[str, ...], place: Path_) -> Iterator[tuple[Path_, Any]]:
    if not path:
        yield place, value
    elif isinstance(value, dict):
        for key in value if path[0] == "*" else {path[0]} & value.keys():
            yield from _at(value[key], path[1:], (*place, key))


def _variables(value: Any, place: Path_) -> Iterator[tuple[Path_, str]]:
    """Variables without a default (Compose: ``$NAME``, ``${NAME}``, ``${NAME:?text}``; ``$$`` is a dollar)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _variables(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _variables(item, (*place, index))
    elif isinstance(value, str):
        for found in re.finditer(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)([^}]*)\})", value):
            name = found[1] or found[2]
            if name and not (found[3] or "").lstrip(":").startswith(("-", "+")):
                yield place, name


def _judge(name: str, raw: Mapping[str, Any], value: Mapping[str, Any], network: str, wrong: Any) -> None:
    place: Path_ = ("services", name)
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_-]*", name):
        wrong(place, "allowed in a service's name: letters, digits, - and _")
    image = raw.get("image")
    if not isinstance(image, str):
        wrong((*place, "image"), "missing; write the image's name (without a tag when 'build' is there)")
    elif "build" not in raw and (":" not in image.rsplit("/", 1)[-1] or image.endswith(":latest")):
        wrong((*place, "image"), f"found '{image}': write a tag other than latest, or a digest: hosts must agree on it")
    if "depends_on" in raw:
        wrong((*place, "depends_on"), "the Swarm ignores it (docker/cli#3880); leave it out, deploy waits by itself")
    deploy = raw.get("deploy") or {}
    labels = pairs(deploy.get("labels"))
    role = labels.get(ROLE_LABEL, "")
    if role not in ("", *ROLES):
        wrong((*place, "deploy", "labels"), f"{ROLE_LABEL} is '{role}', allowed: {', '.join(ROLES)}")
    joined = raw.get("networks") or {}
    names = {str(((value.get("networks") or {}).get(n) or {}).get("name", n)) for n in joined if isinstance(n, str)}
    if role and network not in names:
        wrong((*place, "networks"), f"not on the overlay {network}: LMTP would have no encrypted way")
    if network in names and deploy.get("endpoint_mode") != "dnsrr":
        wrong(
            (*place, "deploy", "endpoint_mode"),
            "write endpoint_mode: dnsrr; a virtual address needs IPVS and cuts idle connections after 15 minutes",
        )
    for index, port in enumerate(raw.get("ports") or []):
        if not isinstance(port, dict) or port.get("mode") != "host":
            wrong(
                (*place, "ports", index),
                "write {target: .., published: .., mode: host}: by the ingress network the client's address is "
                "lost, and Postfix becomes an open relay",
            )
        elif not str(port.get("published", "")).isdigit() or not str(port.get("target", "")).isdigit():
            wrong((*place, "ports", index), "target and published: each one number")
        elif role == "mda" and int(port["target"]) == 24:
            wrong((*place, "ports", index), "LMTP takes mail without a password: it is published nowhere")
    for index, volume in enumerate(raw.get("volumes") or []):
        if isinstance(volume, dict) and volume.get("type") == "tmpfs":
            continue
        source = _volume(volume)
        if source is None or source[0] not in (value.get("volumes") or {}):
            wrong((*place, "volumes", index), "write NAME:PATH with NAME below the top-level 'volumes:'")
    if raw.get("volumes") and _runs_often(deploy):
        wrong((*place, "deploy"), "a service with data runs once: leave mode and replicas out (never two writers)")
    for section in ("update_config", "rollback_config"):
        if raw.get("volumes") and (deploy.get(section) or {}).get("order", "stop-first") != "stop-first":
            wrong((*place, "deploy", section, "order"), "write stop-first: otherwise two writers share a volume")
    grace = _seconds(raw.get("stop_grace_period", "10s"))
    if grace is None or grace > MAX_GRACE:
        wrong((*place, "stop_grace_period"), f"at most {MAX_GRACE}s: later the Swarm starts a second task beside it")


def _judge_bound(service: Service, raw: Mapping[str, Any], wrong: Any) -> None:
    if not service.volumes and _runs_often(raw.get("deploy") or {}):
        wrong(
            ("services", service.name, "deploy"),
            "a service that is bound to a host (stack.placement, or role edge) runs once: leave mode and replicas out",
        )


def _runs_often(deploy: Mapping[str, Any]) -> bool:
    return bool(deploy.get("mode", "replicated") != "replicated" or deploy.get("replicas", 1) != 1)


def _judge_files(service: Service, raw: Mapping[str, Any], document: yamlfile.Document, problems: list[str]) -> None:
    if service.build is not None and not (service.build / "Dockerfile").is_file():
        problems.append(
            document.problem(("services", service.name, "build"), f"no file {service.build / 'Dockerfile'}")
        )


def _service(name: str, raw: Mapping[str, Any], folder: Path, stack: str) -> Service:
    deploy = raw.get("deploy") or {}
    build = raw.get("build")
    if isinstance(build, dict):
        build = build.get("context", ".")
    build_path = (folder / str(build)).resolve() if build is not None else None
    image = str(raw["image"])
    if build_path is not None and (build_path / "Dockerfile").is_file():
        image = f"{image.split(':')[0]}:{content.of_folder(build_path)}"
    volumes = dict(found for v in raw.get("volumes") or [] if (found := _volume(v)) is not None)
    return Service(
        name=name,
        role=pairs(deploy.get("labels")).get(ROLE_LABEL, ""),
        image=image,
        build=build_path,
        volumes=volumes,
        user=str(raw.get("user", "")),
        ports=tuple(int(port["published"]) for port in raw.get("ports") or [] if port.get("published")),
        labels=pairs(deploy.get("labels")),
        entrypoint=_words(raw.get("entrypoint")),
        command=_words(raw.get("command")),
    )


def _words(value: Any) -> tuple[str, ...] | None:
    """Compose: a string is split like a shell's; a list is taken as it is."""
    import shlex

    if value is None:
        return None
    return tuple(shlex.split(value)) if isinstance(value, str) else tuple(str(word) for word in value)


def _volume(value: Any) -> tuple[str, str] | None:
    if isinstance(value, str):
        parts = value.split(":")
        return (parts[0], parts[1]) if len(parts) >= 2 and not parts[0].startswith(("/", ".", "~")) else None
    if isinstance(value, dict) and value.get("type", "volume") == "volume" and value.get("source"):
        return str(value["source"]), str(value.get("target", ""))
    return None


def _seconds(value: Any) -> float | None:
    """A Compose duration ("1m30s") in seconds."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|h|m|s)", str(value))
    if not parts or "".join(n + u for n, u in parts) != str(value):
        return None
    return sum(float(number) * units[unit] for number, unit in parts)


def pairs(value: Any) -> dict[str, str]:
    """Labels or environment, given as a mapping or as a list of ``NAME=value``."""
    if isinstance(value, dict):
        return {str(key): "" if item is None else str(item) for key, item in value.items()}
    return dict(str(item).partition("=")[::2] for item in value or [])


@dataclass(frozen=True)
class Filling:
    """What only the hosts and the Swarm can say, for rendering."""

    commands: Mapping[str, tuple[str, ...]]
    """Service to what its image runs: entrypoint and command."""
    generations: Mapping[str, int]
    """Service to the lowest generation of its volumes that may live."""
    secrets: Mapping[str, str]
    """Name in the file to name in the Swarm."""
    configs: Mapping[str, str]


def render(stack: StackFile, inventory: Inventory, filling: Filling) -> dict[str, Any]:
    """The document for ``docker stack deploy``. Pure data; variables (``${NAME}``) are left to Docker."""
    document: dict[str, Any] = json.loads(json.dumps(stack.document.value))  # what an alias shared is now apart
    document.pop("version", None)
    for key in [key for key in document if str(key).startswith("x-")]:
        del document[key]
    document["networks"] = dict(document.get("networks") or {})
    for name, spec in document["networks"].items():
        if (spec or {}).get("name", name) == inventory.network.name:
            document["networks"][name] = {"external": True, "name": inventory.network.name}
    document["secrets"] = {
        **(document.get("secrets") or {}),
        **{name: {"external": True, "name": real} for name, real in filling.secrets.items()},
    }
    document["configs"] = {
        **(document.get("configs") or {}),
        **{name: {"external": True, "name": real} for name, real in filling.configs.items()},
    }
    for name, service in stack.services.items():
        raw = document["services"][name]
        raw.pop("build", None)
        raw["image"] = service.image
        raw["entrypoint"] = ["/bin/sh", FENCE_PATH]
        raw["command"] = [word.replace("$", "$$") for word in filling.commands[name]]
        raw["configs"] = [*(raw.get("configs") or []), {"source": FENCE, "target": FENCE_PATH, "mode": 0o555}]
        raw["environment"] = {
            **pairs(raw.get("environment")),
            "SWARMMAIL_CLUSTER": inventory.cluster,
            "SWARMMAIL_SERVICE": name,
            "SWARMMAIL_GENERATION": str(filling.generations.get(name, 1)),
            "SWARMMAIL_NODE": "{{.Node.ID}}",
            "SWARMMAIL_VOLUMES": ":".join(service.volumes.values()),
        }
        if service.volumes and (health := _guarded_health(raw.get("healthcheck"))) is not None:
            raw["healthcheck"] = health
        deploy = raw.setdefault("deploy", {})
        if first_host(service, inventory):
            # A task on each node that has the label: one, and during a move a second one. With data its fence waits.
            deploy.pop("replicas", None)
            deploy["mode"] = "global"
            placement = deploy.setdefault("placement", {})
            constraint = f"node.labels.{service.place_label} == {PLACED}"
            placement["constraints"] = [*(placement.get("constraints") or []), constraint]
            deploy.setdefault("update_config", {}).setdefault("order", "stop-first")
    return document


def first_host(service: Service, inventory: Inventory) -> str:
    """The host on which a service that is bound to one begins its life; empty: it runs anywhere.

    Bound are those of ``stack.placement`` (a service with data must be there), and the edge: people must know where it
    is. Not placed, it begins on the first manager.
    """
    placed = inventory.stack.placement.get(service.name, "") if inventory.stack is not None else ""
    return placed or (inventory.lead.name if service.role == "edge" else "")


def _guarded_health(check: Any) -> dict[str, Any] | None:
    """The health check behind the fence: a fence that waits is well. None when there is nothing to change."""
    test = check.get("test") if isinstance(check, dict) and not check.get("disable") else None
    if isinstance(test, str):
        test = ["CMD-SHELL", test]
    if not test or test[0] == "NONE":
        return None
    words = test[1:] if test[0] == "CMD" else ["/bin/sh", "-c", *test[1:]]
    return {**check, "test": ["CMD", "/bin/sh", FENCE_PATH, "--health", *words]}


def label_specs(rendered: dict[str, Any], canonical: Mapping[str, Any]) -> dict[str, Any]:
    """Put the hash of each service, as Docker understood it, on the service: what differs is deployed anew."""
    labelled = copy.deepcopy(rendered)
    for name, raw in labelled["services"].items():
        # without the generation: a move may raise it, and that is no change of the file
        environment = pairs(canonical["services"][name].get("environment"))
        environment.pop("SWARMMAIL_GENERATION", None)
        spec = json.dumps({**canonical["services"][name], "environment": environment}, sort_keys=True, default=str)
        deploy = raw.setdefault("deploy", {})
        deploy["labels"] = {**pairs(deploy.get("labels")), SPEC_LABEL: content.digest(spec.encode())}
    return labelled


# ---- comparing: both sides in the same few words ----

View = Mapping[str, tuple[str, ...]]
"""Aspect of a service to its values, sorted where order does not count."""


def wanted_view(stack: StackFile, rendered: Mapping[str, Any], canonical: Mapping[str, Any], name: str) -> View:
    """How a service should look. ``canonical`` is what ``docker stack config`` made of ``rendered``."""
    service: Mapping[str, Any] = canonical["services"][name]
    deploy = service.get("deploy") or {}
    networks = {n: (spec or {}).get("name", n) for n, spec in (canonical.get("networks") or {}).items()}
    named = {
        kind: {n: (spec or {}).get("name", n) for n, spec in (canonical.get(kind) or {}).items()}
        for kind in ("secrets", "configs")
    }
    raw_labels = pairs((rendered["services"][name].get("deploy") or {}).get("labels"))
    return {
        "image": (str(service["image"]),),
        "command": tuple(str(word) for word in service.get("command") or ()),
        "environment": _sorted(f"{k}={v}" for k, v in pairs(service.get("environment")).items()),
        "volumes": _sorted(f"{stack.volume_name(v)}:{p}" for v, p in stack.services[name].volumes.items()),
        "networks": _sorted(networks.get(n, f"{stack.name}_{n}") for n in service.get("networks") or {}),
        "ports": _sorted(
            f"{port.get('published')}->{port.get('target')}/{port.get('protocol', 'tcp')}"
            for port in service.get("ports") or ()
        ),
        "secrets": _sorted(named["secrets"][item["source"]] for item in service.get("secrets") or ()),
        "configs": _sorted(named["configs"][item["source"]] for item in service.get("configs") or ()),
        "placement": _sorted((deploy.get("placement") or {}).get("constraints") or ()),
        "replicas": ("global" if deploy.get("mode") == "global" else str(deploy.get("replicas", 1)),),
        "rights": _rights(
            service.get("cap_add"), service.get("cap_drop"), service.get("user"), service.get("read_only")
        ),
        "definition": (raw_labels.get(SPEC_LABEL, ""),),
    }


def seen_view(raw: Mapping[str, Any], network_names: Mapping[str, str]) -> View:
    """How a service of the Swarm (``GET /services``) looks. ``network_names``: network id to name."""
    spec = raw["Spec"]
    task = spec["TaskTemplate"]
    container = task["ContainerSpec"]
    endpoint = spec.get("EndpointSpec") or {}
    replicated = (spec.get("Mode") or {}).get("Replicated") or {}
    networks = task.get("Networks") or spec.get("Networks") or ()
    return {
        "image": (container["Image"],),
        "command": tuple(container.get("Args") or ()),
        "environment": _sorted(container.get("Env") or ()),
        "volumes": _sorted(
            f"{m.get('Source')}:{m.get('Target')}" for m in container.get("Mounts") or () if m.get("Type") == "volume"
        ),
        "networks": _sorted(network_names.get(n["Target"], n["Target"]) for n in networks),
        "ports": _sorted(
            f"{port.get('PublishedPort')}->{port.get('TargetPort')}/{port.get('Protocol', 'tcp')}"
            for port in endpoint.get("Ports") or ()
        ),
        "secrets": _sorted(item["SecretName"] for item in container.get("Secrets") or ()),
        "configs": _sorted(item["ConfigName"] for item in container.get("Configs") or ()),
        "placement": _sorted((task.get("Placement") or {}).get("Constraints") or ()),
        "replicas": ("global" if "Global" in (spec.get("Mode") or {}) else str(replicated.get("Replicas", 1)),),
        "rights": _rights(
            container.get("CapabilityAdd"),
            container.get("CapabilityDrop"),
            container.get("User"),
            container.get("ReadOnly"),
        ),
        "definition": ((spec.get("Labels") or {}).get(SPEC_LABEL, ""),),
    }


def _rights(add: Any, drop: Any, user: Any, read_only: Any) -> tuple[str, ...]:
    """What a container may do; the API writes a right with ``CAP_`` before it, a Compose file need not."""
    given = {str(cap).upper().removeprefix("CAP_") for cap in add or ()}
    taken = {str(cap).upper().removeprefix("CAP_") for cap in drop or ()}
    return (
        *(f"CAP_{cap}" for cap in sorted(given)),
        *(f"without CAP_{cap}" for cap in sorted(taken)),
        f"user {user or '(of the image)'}",
        *(["read only"] if read_only else []),
    )


def _sorted(items: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(str(item) for item in items))


def differences(seen: View, wanted: View) -> list[str]:
    """Lines for people: what would change. The definition's hash counts only where nothing else shows."""
    lines = []
    for aspect, values in wanted.items():
        before = seen.get(aspect, ())
        if before == values or aspect == "definition":
            continue
        if aspect == "command" or len(values) == len(before) == 1:
            lines.append(f"{aspect}: {' '.join(before) or '(none)'} -> {' '.join(values) or '(none)'}")
        else:
            lines += [f"{aspect}: - {value}" for value in before if value not in values]
            lines += [f"{aspect}: + {value}" for value in values if value not in before]
    if not lines and seen.get("definition") != wanted.get("definition"):
        lines.append("definition: other settings of the stack file (health check, rights, limits, update rules)")
    return lines
