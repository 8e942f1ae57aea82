"""The inventory: the wanted state, as the operator writes it (``inventories/example.yml`` is its manual).

``load`` reads a file and judges all of it: types, names, and whether the parts fit each other. It reads no
other file and reaches no host; ``check_files`` looks whether the files exist that the inventory names.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Container, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarmmail.model import values, yamlfile
from swarmmail.model.errors import InputError
from swarmmail.model.values import is_ip
from swarmmail.model.yamlfile import did_you_mean, short

MANUAL = "example.yml"
WAY = "a host of this inventory, or [user@]host[:port]"

# ---- the file ----


class Section(BaseModel):
    """A mapping of the file. A known key without a value counts as not written."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _blank_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: item for key, item in data.items() if item is not None or key not in cls.model_fields}
        return {} if data is None else data

    def written(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class Ssh(Section):
    """How to log in; each key may also stand at a host. ``connect_timeout`` in seconds."""

    user: values.Login = "root"
    port: values.Port = 22
    key: values.FilePath | None = Field(None, description="a path")
    known_hosts: values.FilePath = Field(Path("~/.ssh/known_hosts"), validate_default=True)
    connect_timeout: values.Seconds = 10


class HostEntry(Ssh):
    """A host as it is written."""

    address: values.Address
    jump: str | None = Field(None, description=WAY)
    role: values.Role
    advertise: values.Advertise | None = Field(None, description=values.REACHABLE)
    nat: values.Switch = False


class Network(Section):
    """The overlay. ``mtu`` is that of the underlay, in bytes."""

    name: values.NetworkName = "local-mail-delivery"
    subnet: values.Subnet = "auto"
    encryption: values.Encryption = "auto"
    mtu: values.Mtu = "auto"
    tunnel_subnet: values.Subnet = "auto"
    tunnel_port: values.Port = 51820


class Tls(Section):
    """Certificate chain and key as PEM files; ``ca`` is what a client shall trust, None: the system's."""

    certificate: values.FilePath
    key: values.FilePath
    ca: values.FilePath | None = Field(None, description="a path")


class Stack(Section):
    """The services, and where they start their lives."""

    path: values.FilePath
    name: values.StackName = "mail"
    build: str = Field("local", description="local, or a host of this inventory")
    settings: dict[values.SettingName, values.Setting] = Field({}, description="a mapping from name to text")
    tls: Tls | None = None
    placement: dict[str, str] = Field({}, description="a mapping from service to host")
    address_hook: values.FilePath | None = Field(None, description="a path")


class File(Section):
    """The whole file, as it is written."""

    cluster: values.Cluster
    ssh: Ssh = Field(default_factory=Ssh)
    hosts: dict[values.HostName, HostEntry] = Field(description="a mapping")
    network: Network = Field(default_factory=Network)
    stack: Stack | None = None


# ---- the inventory, with everything filled in ----


class Jump(Section):
    """The way to a host: through ``member``, a host of this inventory, or else through ``address``."""

    member: str | None = None
    address: str = ""
    user: str = "root"
    port: int = 22


class Host(Ssh):
    """A host with the defaults of ``ssh:`` merged in. Paths are absolute."""

    name: str
    address: str
    jump: Jump | None = None
    role: values.Role
    advertise: str
    nat: bool = False


class Inventory(Section):
    """The wanted state. ``hosts`` is in the order of the file."""

    path: Path
    cluster: str
    hosts: dict[str, Host]
    network: Network
    stack: Stack | None = None

    @property
    def managers(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.role == "manager"]

    @property
    def workers(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.role == "worker"]

    @property
    def lead(self) -> Host:
        """The first manager of the file: the Swarm is made there."""
        return self.managers[0]

    def tunnel_port(self, host: str) -> int:
        """UDP port at which others call a host's tunnel; 0 behind NAT, where nobody can: it calls, from any port."""
        return 0 if self.hosts[host].nat else self.network.tunnel_port

    def notes(self) -> list[str]:
        """What is allowed, but should be known."""
        notes = []
        if self.network.encryption == "none":
            notes.append(
                "NO ENCRYPTION (network.encryption: none): every mail between the hosts crosses the network "
                "IN CLEAR TEXT, and whoever is on the path can read and forge it"
            )
        count = len(self.managers)
        if count % 2 == 0:
            notes.append(
                f"{count} managers survive the loss of {(count - 1) // 2 or 'none'}, no more than {count - 1} would, "
                f"because {count // 2 + 1} of them must agree: make it {count - 1} or {count + 1}"
            )
        for host in self.hosts.values():
            if host.jump and not host.jump.member and (hint := did_you_mean(host.jump.address, self.hosts)):
                notes.append(
                    f"hosts.{host.name}.jump: {host.jump.address} is no host of the inventory, so it is taken "
                    f"as a name of the network; {hint}"
                )
        return notes


# ---- reading and judging ----


def load(path: Path) -> Inventory:
    """Read and judge an inventory. Raises InputError that holds every problem, each with file and line."""
    document = yamlfile.read(path)
    raw = document.value
    context = {"folder": path.parent.resolve()}
    if not isinstance(raw, dict):
        allowed = ", ".join(File.model_fields)
        raise InputError([document.problem((), f"found {short(raw)}, allowed: a mapping with the keys {allowed}")])
    problems: list[str] = []
    hosts_whole = True
    try:
        file = File.model_validate(raw, context=context)
    except ValidationError as error:
        problems = yamlfile.problems(document, error, File, secret=("stack", "settings"))
        hosts_whole = all(place["loc"][0] != "hosts" for place in error.errors())
        file = _salvage(raw, error, context)
    names = list(raw["hosts"]) if isinstance(raw.get("hosts"), dict) else []
    problems += [
        document.problem(place, text)
        for check in (_check_hosts(file, names, hosts_whole), _check_network(file), _check_stack(file, names))
        for place, text in check
    ]
    if problems:
        raise InputError(sorted(dict.fromkeys(problems), key=lambda text: (_line(path, text), text)))
    hosts = {name: _host(name, entry, file) for name, entry in file.hosts.items()}
    return Inventory(path=path, cluster=file.cluster, hosts=hosts, network=file.network, stack=file.stack)


def _line(path: Path, problem: str) -> int:
    return int(problem.removeprefix(f"{path}:").partition(":")[0])


def _salvage(raw: dict[str, Any], error: ValidationError, context: dict[str, Any]) -> File:
    """The file without what is wrong in it, so that one run also shows the problems of the rest."""
    rest = copy.deepcopy(raw)
    while True:
        for one in error.errors():
            place = yamlfile.place_of(one["loc"])
            place = place[: 2 if place[0] == "hosts" else -1 if one["type"] == "missing" else None]
            holder: Any = rest
            for step in place[:-1]:
                holder = holder.get(step, {})
            if place:
                holder.pop(place[-1], None)
        stand_ins = {key: item for key, item in {"cluster": "x", "hosts": {}}.items() if not rest.get(key)}
        try:
            return File.model_validate(rest | stand_ins, context=context)
        except ValidationError as again:
            error = again


def _host(name: str, entry: HostEntry, file: File) -> Host:
    given = {**file.ssh.written(), **entry.written()}
    jump = _jump(entry.jump, file.hosts, given.get("user", file.ssh.user)) if entry.jump else None
    return Host(**{**given, "name": name, "jump": jump, "advertise": entry.advertise or entry.address})


def _jump(text: str, names: Container[str], user: str) -> Jump:
    """Parse ``jump``; raises ValueError. A name of the inventory wins over a name of the network."""
    if text in names:
        return Jump(member=text)
    parts = re.fullmatch(r"(?:([A-Za-z0-9_][\w.-]*)@)?(\[[\da-fA-F:.]+\]|[^\s:@\[\]]+)(?::(\d{1,5}))?", text, re.A)
    if not parts or not 1 <= int(parts[3] or 22) <= 65535:
        raise ValueError
    return Jump(address=values.address(parts[2].strip("[]")), user=parts[1] or user, port=int(parts[3] or 22))


Problems = Iterator[tuple[tuple[str, ...], str]]


def _found(value: str, allowed: str, names: list[str]) -> str:
    hint = did_you_mean(value, names)
    return f"found {short(value)}, allowed: {allowed}" + (f"; {hint}" if hint else "")


def _check_hosts(file: File, names: list[str], whole: bool) -> Problems:
    """``names``: all hosts that are written; ``whole``: none of them is missing from ``file``."""
    hosts = file.hosts
    ways: dict[tuple[str, int, str | None], str] = {}
    advertised: dict[str, str] = {}
    first_manager = next((name for name, host in hosts.items() if host.role == "manager"), None)
    if whole and first_manager is None:
        yield ("hosts",), "no host has the role manager; a Swarm needs one"
    natted = ""
    for name, host in hosts.items():
        at = ("hosts", name)
        port = host.port if "port" in host.model_fields_set else file.ssh.port
        first = ways.setdefault((host.address.lower().removesuffix("."), port, host.jump), name)
        if first != name:
            yield (*at, "address"), f"found {short(host.address)}, the same SSH address and port as {first}"
        yield from _check_advertise(name, host, first != name, advertised)
        if host.jump:
            yield from _check_jump(name, hosts, names)
        if not host.nat:
            continue
        if natted:
            yield (*at, "nat"), f"{natted} is behind NAT too, and neither could open a connection to the other"
        natted = natted or name
        if name == first_manager and whole:
            yield (*at, "nat"), "the first manager must be reachable for all others: put another manager first"
        if file.network.encryption == "ipsec":
            yield (
                (*at, "nat"),
                "not with encryption ipsec: transport-mode ESP through NAT breaks the UDP checksums of the "
                "overlay (moby#37115), and nothing arrives; write encryption auto or wireguard",
            )
        if file.network.encryption == "none":
            yield (
                (*at, "nat"),
                "not with encryption none: the overlay's datagrams cannot reach a host behind NAT; write "
                "encryption auto or wireguard",
            )


def _check_advertise(name: str, host: HostEntry, repeated: bool, seen: dict[str, str]) -> Problems:
    place = ("hosts", name, "advertise")
    try:
        address = host.advertise or values.advertise(host.address)
    except ValueError:
        why = "no address that other hosts can reach" if is_ip(host.address) else "a name"
        yield place, f"missing, allowed: {values.REACHABLE}; needed because address {host.address} is {why}"
        return
    first = seen.setdefault(address, name)
    if first != name and not (repeated and host.advertise is None):  # that is one mistake, not two
        yield place, f"found {short(address)}, which {first} advertises already"
    family, expected = (ip_address(text).version for text in (address, next(iter(seen))))
    if family != expected:
        yield place, f"found {short(address)} (IPv{family}), but {seen[next(iter(seen))]} advertises IPv{expected}"


def _check_jump(name: str, hosts: Mapping[str, HostEntry], names: list[str]) -> Problems:
    place, text = ("hosts", name, "jump"), hosts[name].jump or ""
    try:
        _jump(text, names, "root")
    except ValueError:
        yield place, _found(text, WAY, names)
        return
    way = [name]
    while (step := hosts[way[-1]].jump) in hosts and step not in way:
        way.append(str(step))
    if step == name and name == min(way, key=list(hosts).index):  # one message for the whole circle
        yield place, f"the jumps go in a circle: {' -> '.join([*way, name])}"


def _check_network(file: File) -> Problems:
    subnet, tunnel = file.network.subnet, file.network.tunnel_subnet
    for key, network in (("subnet", subnet), ("tunnel_subnet", tunnel)):
        for name, host in file.hosts.items():
            for address in dict.fromkeys((host.address, host.advertise or host.address)):
                if network != "auto" and is_ip(address) and ip_address(address) in network:
                    yield ("network", key), f"found {str(network)!r}, which holds {name}'s own address {address}"
    if subnet != "auto" and tunnel != "auto" and subnet.overlaps(tunnel):
        yield ("network", "subnet"), f"found {str(subnet)!r}, which overlaps tunnel_subnet {tunnel}"
    if tunnel != "auto" and tunnel.num_addresses - 2 < len(file.hosts):
        room = tunnel.num_addresses - 2
        yield ("network", "tunnel_subnet"), f"found {str(tunnel)!r}, room for {room} of {len(file.hosts)} hosts"


def _check_stack(file: File, names: list[str]) -> Problems:
    if not file.stack:
        return
    builders = ["local", *names]
    if file.stack.build not in builders:
        yield ("stack", "build"), _found(file.stack.build, ", ".join(builders), builders)
    for service, host in file.stack.placement.items():
        if host not in names:
            yield ("stack", "placement", service), _found(host, ", ".join(names) or "a host", names)


# ---- files ----


def check_files(inventory: Inventory) -> list[str]:
    """What is missing, unreadable or no program among the files that the inventory names, each with its line."""
    document = yamlfile.read(inventory.path)
    wanted: dict[tuple[str, ...], Path] = {}
    for host in inventory.hosts.values():
        own = document.value["hosts"][host.name]
        for key, path in (("key", host.key), ("known_hosts", host.known_hosts)):
            if path:
                wanted[("hosts", host.name, key) if own.get(key) else ("ssh", key)] = path
    if stack := inventory.stack:
        wanted["stack", "path"] = stack.path / "stack.yml"
        if stack.tls:
            wanted |= {("stack", "tls", key): path for key, path in stack.tls if path}
        if stack.address_hook:
            wanted["stack", "address_hook"] = stack.address_hook
    return [
        document.problem(place, f"{path}: {wrong}")
        for place, path in wanted.items()
        if (wrong := _unusable(path, program=place[-1] == "address_hook"))
    ]


def _unusable(path: Path, program: bool) -> str:
    """Why a file can't be read, or be run if it is a program; empty when it can."""
    if not path.exists():
        return "no such file"
    if not (path.is_file() and os.access(path, os.R_OK)):
        return "cannot be read"
    return "is not executable; chmod +x it" if program and not os.access(path, os.X_OK) else ""


def choose_inventory(explicit: str | None, environ: Mapping[str, str], fabric_config: str | None, folder: Path) -> Path:
    """The inventory file to use; a bare name such as ``lab`` means ``inventories/lab.yml`` in ``folder``.

    ``explicit`` is ``--inventory``, ``fabric_config`` the key ``swarmmail.inventory`` of fabric.yml; other
    paths than bare names are relative to the working folder. Raises InputError that says which files there
    are and what to type.
    """
    folder /= "inventories"
    files = sorted(p for p in folder.glob("*.y*ml") if p.suffix in (".yml", ".yaml") and p.name != MANUAL)
    names = [path.stem if path.suffix == ".yml" else str(path) for path in files]
    there = f"there are: {', '.join(names)}" if names else f"there is none in {folder}/"
    for source, wanted in (
        ("--inventory", explicit),
        ("SWARMMAIL_INVENTORY", environ.get("SWARMMAIL_INVENTORY") or None),
        ("swarmmail.inventory of fabric.yml", fabric_config or None),
    ):
        if wanted is None:
            continue
        bare = re.fullmatch(r"[^/\\]+", wanted) and not wanted.endswith((".yml", ".yaml"))
        path = folder / f"{wanted}.yml" if bare else Path(wanted)
        if not bare and not path.is_file() and (folder / wanted).is_file():
            path = folder / wanted
        if path.is_file():
            return path
        hint = did_you_mean(path.stem, names)
        raise InputError([f"{source}: no inventory {short(wanted)}; {there}" + (f"; {hint}" if hint else "")])
    if len(files) == 1:
        return files[0]
    if names:
        todo = f"type --inventory {names[0]}, or set SWARMMAIL_INVENTORY={names[0]}"
        raise InputError([f"which inventory? {there}; {todo}"])
    todo = f"copy {folder / MANUAL} and edit it, or make a lab: fab lab.up"
    raise InputError([f"no inventory: {there}; {todo}"])
