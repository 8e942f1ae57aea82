"""What was observed on a host, as plain data; and the reading of what ``hosts/facts.sh`` prints."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swarmmail.model import esp, printed

IPv4Network = ipaddress.IPv4Network
MESH = "swarmmail"
"""Name of the tunnel's link on every host."""


@dataclass(frozen=True)
class Marker:
    """The marker of a volume: which store this is, and which copy of it is the live one (invariant 3)."""

    volume: str
    cluster: str
    service: str
    generation: int
    node: str
    state: str


@dataclass(frozen=True)
class Mesh:
    """The WireGuard tunnel of a host, as configured and as running."""

    config: str = ""
    public_key: str = ""
    peers: frozenset[str] = frozenset()
    """Public keys of the running tunnel's peers."""
    heard: Mapping[str, float] = field(default_factory=dict)
    """Public key of a peer to the seconds since the last handshake with it; without those never heard of."""
    age: float = 0.0
    """Seconds since the tunnel was started; 0 when it is down or that is not known."""
    port: int = 0
    """UDP port that the running tunnel listens on; 0 when it is not known."""
    address: str = ""
    """The address the running tunnel has; empty when it is down."""
    guarded: bool = False
    """The blackhole route and the rule against foreign VXLAN are in force."""
    files: dict[str, str] = field(default_factory=dict)
    """Path to SHA-256 of the files that swarmmail puts on a host."""


@dataclass(frozen=True)
class HostFacts:
    name: str
    unreachable: str = ""
    """Why the host did not answer; then everything else is empty."""
    os: str = ""
    """ID of os-release(5): ``debian``, ``ubuntu``, ..."""
    os_like: tuple[str, ...] = ()
    os_name: str = ""
    kernel: str = ""
    machine: str = ""
    hostname: str = ""
    clock: float = 0.0
    systemd: bool = False
    programs: frozenset[str] = frozenset()
    engine: str = ""
    """Version of the running engine; empty when Docker does not answer."""
    swarm: str = "inactive"
    """LocalNodeState: inactive, pending, active, error, locked."""
    swarm_error: str = ""
    node: str = ""
    node_address: str = ""
    is_manager: bool = False
    cluster: str = ""
    """Id of the Swarm, known to managers only."""
    managers: tuple[str, ...] = ()
    """Addresses (without port) of the managers that this node was told of."""
    peers: frozenset[str] | None = None
    """Addresses of the nodes that this one hears by gossip, its own included; None when that can't be seen."""
    live_restore: bool = False
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Link name to its IPv4 and IPv6 addresses."""
    mtus: dict[str, int] = field(default_factory=dict)
    routes: tuple[IPv4Network, ...] = ()
    """Where the host sends packets itself: no pool of ours may overlap (default routes left out)."""
    resolvers: tuple[str, ...] = ()
    tun: bool = False
    wireguard_kernel: bool = False
    esp: bool = False
    """The kernel takes an ESP state with AES-GCM."""
    docker_esp: bool | None = None
    """The running Docker can tell the kernel of ESP states; None when it does not run."""
    mesh: Mesh = Mesh()
    units: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Unit to (active state, enabled state)."""
    overlays: Mapping[str, int] = field(default_factory=dict)
    """The overlays that the host has tasks on: the first ten characters of the network's id, to its VNI."""
    esp_rules: tuple[str, ...] = ()
    """The iptables rules among which are those of Docker's own encryption."""
    overlay_peers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The same overlays, to the addresses of the hosts to which they send."""
    esp_peers: frozenset[str] | None = None
    """The addresses that ESP goes to and comes from; None when the host can't tell."""
    listening: frozenset[int] = frozenset()
    """TCP ports that something listens on, other than on loopback only."""
    markers: tuple[Marker, ...] = ()

    @property
    def esp_came_late(self) -> bool:
        """The kernel has IPsec, and had none when Docker was started: it refuses each task on an overlay that it is to
        encrypt. Where it has such tasks, it evidently does not."""
        return self.esp and self.docker_esp is False and not self.overlays

    def link_of(self, address: str) -> str | None:
        """The link that carries an address; None when the address is not the host's own (NAT)."""
        return next((link for link, own in self.addresses.items() if address in own), None)


def parse(name: str, text: str) -> HostFacts:
    """Read what ``facts.sh`` printed. A section that is missing or not readable counts as empty."""
    sections = printed.sections(text)

    def lines(section: str) -> list[str]:
        return [line.strip() for line in sections.get(section, "").splitlines() if line.strip()]

    def first(section: str) -> str:
        return next(iter(lines(section)), "")

    clock = _number(first("clock"))
    peers = {words[0]: _number(words[1]) for line in lines("mesh-peers") if len(words := line.split()) == 2}
    units = _units(sections.get("units", ""))
    overlays = [p for line in lines("overlays") if len(p := line.split()) > 1 and p[1].isdecimal()]
    release = _shell_values(sections.get("os", ""))
    links = [link for link in printed.json_objects(sections.get("addresses", "")) if "ifname" in link]
    addresses = {link["ifname"]: tuple(a["local"] for a in link.get("addr_info", ()) if "local" in a) for link in links}
    return HostFacts(
        name=name,
        os=release.get("ID", ""),
        os_like=tuple(release.get("ID_LIKE", "").split()),
        os_name=release.get("PRETTY_NAME", ""),
        kernel=first("kernel"),
        machine=first("machine"),
        hostname=first("hostname"),
        clock=clock,
        systemd=first("systemd") == "yes",
        programs=frozenset(lines("programs")),
        **of_docker(printed.json_object(sections.get("docker", "")), _peers(sections.get("peers", ""))),
        addresses=addresses,
        mtus={link["ifname"]: int(link.get("mtu", 1500)) for link in links},
        routes=tuple(_routes(printed.json_objects(sections.get("routes", "")))),
        resolvers=tuple(parts[1] for line in lines("resolvers") if len(parts := line.split()) > 1),
        tun=first("tun") == "yes",
        wireguard_kernel=first("wireguard") == "yes",
        esp=first("esp") == "yes",
        docker_esp={"yes": True, "no": False}.get(first("docker-esp")),
        mesh=Mesh(
            config=sections.get("mesh-config", "").strip(),
            public_key=first("mesh-key"),
            peers=frozenset(peers),
            heard={key: max(0.0, clock - stamp) for key, stamp in peers.items() if stamp},
            age=_age(units.get(f"wg-quick@{MESH}", {}), _number(first("uptime"))),
            port=int(_number(first("mesh-port"))),
            address=next(iter(addresses.get(MESH, ())), ""),
            guarded=first("guard") == "yes",
            files={words[1]: words[0] for line in lines("files") if len(words := line.split(None, 1)) == 2},
        ),
        units={unit: (values["ActiveState"], values.get("UnitFileState", "")) for unit, values in units.items()},
        overlays={p[0]: int(p[1]) for p in overlays},
        overlay_peers={p[0]: frozenset(p[2:]) for p in overlays if p[2:]},
        esp_peers=esp.peers(lines("esp-peers")) if first("esp-peers") == "read" else None,
        esp_rules=tuple(line for line in lines("esp-rules") if line.startswith("-A")),
        listening=frozenset(_ports(lines("listening"))),
        markers=tuple(_markers(sections.get("volumes", ""))),
    )


def of_docker(info: Mapping[str, Any], peers: frozenset[str] | None) -> dict[str, Any]:
    """The facts that Docker knows: of its ``info``, and the addresses of ``peers`` (None: can't be seen)."""
    engine = info.get("ServerVersion") or "" if not info.get("ServerErrors") else ""
    swarm = info.get("Swarm") or {} if engine else {}
    return {
        "engine": engine,
        "swarm": swarm.get("LocalNodeState") or "inactive",
        "swarm_error": swarm.get("Error") or "",
        "node": swarm.get("NodeID") or "",
        "node_address": swarm.get("NodeAddr") or "",
        "is_manager": bool(swarm.get("ControlAvailable")),
        "cluster": (swarm.get("Cluster") or {}).get("ID", ""),
        "managers": tuple(
            manager.get("Addr", "").rsplit(":", 1)[0].strip("[]") for manager in swarm.get("RemoteManagers") or ()
        ),
        "peers": peers if swarm.get("LocalNodeState") == "active" else None,
        "live_restore": bool(info.get("LiveRestoreEnabled")),
    }


def peers_of(network: Mapping[str, Any]) -> frozenset[str]:
    """Who takes part in the gossip of a network (``docker network inspect``). The ingress network is joined by every
    node: who is not among its peers resolves no name, while ``docker node ls`` still says Ready."""
    return frozenset(peer.get("IP", "") for peer in network.get("Peers") or () if isinstance(peer, dict))


def parse_marker(volume: str, text: str) -> Marker:
    """Read one marker; an unreadable generation counts as 0, which no service accepts."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    generation = values.get("generation", "")
    return Marker(
        volume=volume,
        cluster=values.get("cluster", ""),
        service=values.get("service", ""),
        generation=int(generation) if generation.isascii() and generation.isdigit() else 0,
        node=values.get("node", ""),
        state=values.get("state", ""),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _shell_values(text: str) -> dict[str, str]:
    values = {}
    for line in text.splitlines():
        name, sign, value = line.partition("=")
        if sign:
            try:
                values[name.strip()] = " ".join(shlex.split(value))
            except ValueError:
                continue
    return values


def _routes(entries: list[dict[str, Any]]) -> list[IPv4Network]:
    """Networks with an own route. Routes of Docker's own bridges count: they are in use on that host."""
    networks = []
    for entry in entries:
        if entry.get("type", "unicast") not in ("unicast", "blackhole") or entry.get("dst") in (
            None,
            "default",
        ):
            continue
        try:
            networks.append(IPv4Network(entry["dst"], strict=False))
        except ValueError:
            continue
    return networks


def _peers(text: str) -> frozenset[str] | None:
    if not text.strip():
        return None  # the operator removed the ingress network
    return peers_of({"Peers": printed.json_objects(text)})


def _units(text: str) -> dict[str, dict[str, str]]:
    """``systemctl show``: a block of properties for each unit."""
    units = {}
    for block in re.split(r"\n\s*\n", text):
        values = dict(line.strip().split("=", 1) for line in block.splitlines() if "=" in line)
        if values.get("Id") and "ActiveState" in values:
            units[values["Id"].removesuffix(".service")] = values
    return units


def _age(unit: Mapping[str, str], uptime: float) -> float:
    """Seconds for which a unit has been active; 0 when it is not (org.freedesktop.systemd1(5): microseconds, monotonic
    as ``/proc/uptime`` is)."""
    since = _number(unit.get("ActiveEnterTimestampMonotonic", ""))
    return max(0.0, uptime - since / 1e6) if since and uptime and unit["ActiveState"] == "active" else 0.0


def _ports(lines: list[str]) -> list[int]:
    ports = []
    for line in lines:
        words = line.split()
        if len(words) > 3 and not words[3].startswith(("127.", "[::1]")):
            port = words[3].rsplit(":", 1)[-1]
            if port.isdigit():
                ports.append(int(port))
    return ports


def _markers(text: str) -> list[Marker]:
    blocks: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("volume="):
            blocks.append((line.removeprefix("volume="), []))
        elif blocks:
            blocks[-1][1].append(line)
    return [parse_marker(volume, "\n".join(body)) for volume, body in blocks]
