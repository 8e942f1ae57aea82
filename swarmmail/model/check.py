"""``fab check``: from what was measured on the hosts to findings. Pure; the pairs are in ``check_pair.py``."""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Any

from swarmmail.model import bootstrap, engines, printed
from swarmmail.model.errors import SwarmmailError
from swarmmail.model.facts import MESH, HostFacts
from swarmmail.model.findings import Finding, Level, error, note, ok, warning
from swarmmail.model.firewall import Packet, Ruleset
from swarmmail.model.inventory import Inventory
from swarmmail.model.network import DATA_PORT
from swarmmail.model.swarm import Swarm

Findings = Iterator[Finding]
CONTROL_PORT, GOSSIP_PORT = 2377, bootstrap.GOSSIP_PORT
CLOCK_WARNING, CLOCK_ERROR = 2.0, 30.0
"""Seconds. A certificate of the Swarm is valid from the moment that the manager's clock says."""
DISK_WARNING, DISK_ERROR = 5 << 30, 1 << 30  # bytes free; the images of the mail stack take about 0.3 GB a version
MEMORY_WARNING, MEMORY_ERROR = 200 << 20, 64 << 20  # bytes available; a host with mail took 189 MiB in all
OLDEST_KERNEL = (4, 19)
CONFIG = "/etc/docker/daemon.json"
_LISTS = {  # dockerd(8): names of flags whose key in daemon.json differs
    "host": "hosts", "H": "hosts", "label": "labels", "insecure-registry": "insecure-registries",
    "registry-mirror": "registry-mirrors", "default-address-pool": "default-address-pools",
}  # fmt: skip


@dataclass(frozen=True)
class Socket:
    proto: str
    address: str
    port: int
    process: str
    pid: int


class Probe:
    """What ``check.sh`` printed on one host. A section that is missing or not readable counts as empty."""

    def __init__(self, text: str) -> None:
        self.sections = {name: body.strip() for name, body in printed.sections(text).items()}
        self.complete = "end" in self.sections

    def __getitem__(self, name: str) -> str:
        return self.sections.get(name, "")

    def lines(self, name: str) -> list[str]:
        return self[name].splitlines()

    def values(self, name: str) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.lines(name) if "=" in line)

    @cached_property
    def programs(self) -> set[str]:
        return {path.rsplit("/", 1)[-1] for path in self.lines("programs")}

    @cached_property
    def info(self) -> dict[str, Any]:
        return printed.json_object(self["info"])

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """daemon.json; None when it is not a JSON object."""
        text = self["daemon.json"]
        try:
            value = json.loads(text) if text else {}
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    @cached_property
    def flags(self) -> dict[str, str]:
        """The options of the daemon's next start, under their names in daemon.json."""
        try:
            words = shlex.split(self["next"])[1:]
        except ValueError:
            words = self["next"].split()[1:]
        found = {}
        for index, word in enumerate(words):
            if word.startswith("-"):
                name, sign, value = word.lstrip("-").partition("=")
                following = words[index + 1] if index + 1 < len(words) else ""
                found[_LISTS.get(name, name)] = (
                    value if sign else "true" if following.startswith("-") else following or "true"
                )
        return found

    @cached_property
    def kernel(self) -> dict[str, str]:
        """Ability to why it is missing; empty text: it is there."""
        found = {}
        for line in self.lines("kernel"):
            kind, _, rest = line.partition(" ")
            name, _, reason = rest.partition(":")
            if kind in ("ok", "no") and name:
                found[name] = "" if kind == "ok" else reason.strip() or "refused"
        return found

    @cached_property
    def units(self) -> dict[str, tuple[str, str]]:
        return {p[0]: (p[1], p[2] if len(p) > 2 else "") for line in self.lines("units") if len(p := line.split()) > 1}

    def active(self, unit: str) -> bool:
        return self.units.get(unit, ("", ""))[0] == "active"

    @cached_property
    def firewall(self) -> Ruleset:
        return Ruleset(self["nft"])

    @cached_property
    def sockets(self) -> list[Socket]:
        found = []
        for line in self.lines("sockets"):
            words = line.split()
            if len(words) > 4 and words[4].rpartition(":")[2].isdecimal():
                address, _, port = words[4].rpartition(":")
                users = re.search(r'\(\("([^"]+)",pid=(\d+)', line)
                name, pid = (users[1], int(users[2])) if users else ("", 0)
                found.append(Socket(words[0], address.strip("[]"), int(port), name, pid))
        return found

    @cached_property
    def packages(self) -> dict[str, tuple[str, str]]:
        """Package to (installed, candidate), of those that are installed."""
        found: dict[str, list[str]] = {}
        current: list[str] = []
        for line in self.lines("packages"):
            if line.endswith(":") and not line.startswith(" "):
                current = found.setdefault(line[:-1], [])
            else:
                current.append(line.split(":", 1)[-1].strip())
        return {name: (v[0], v[1]) for name, v in found.items() if len(v) > 1 and v[0] != "(none)"}

    @cached_property
    def addresses(self) -> list[tuple[str, dict[str, Any]]]:
        """(link, entry of ``ip -j addr``)."""
        try:
            links = json.loads(self["links"] or "[]")
            return [
                (k["ifname"], a) for k in links if k.get("ifname") for a in k.get("addr_info", ()) if a.get("local")
            ]
        except (ValueError, TypeError, KeyError):
            return []


@dataclass(frozen=True)
class Published:
    """Ports that the stack publishes, and where their service is, or begins."""

    service: str
    ports: tuple[int, ...]
    host: str | None


@dataclass(frozen=True)
class Measured:
    """All that a check looks at."""

    inventory: Inventory
    facts: Mapping[str, HostFacts]
    swarm: Swarm | None = None
    encryption: str = "wireguard"
    design: bootstrap.Design | None = None
    refused: tuple[SwarmmailError, ...] = ()
    probes: Mapping[str, Probe] = field(default_factory=dict)
    clocks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Host to (seconds ahead of this machine, uncertainty in seconds: half the round trip)."""
    published: tuple[Published, ...] = ()

    @property
    def awake(self) -> dict[str, HostFacts]:
        return {name: facts for name, facts in self.facts.items() if not facts.unreachable}

    def address(self, host: str) -> str:
        return self.inventory.hosts[host].advertise

    @property
    def running(self) -> bool:
        """Our Swarm is there already."""
        return self.swarm is not None


# ---- the mends ----


def drop_key(key: str, restart: bool = True) -> str:
    """A command that takes a key out of daemon.json; the rest of it stays."""
    code = f"import json;p={CONFIG!r};d=json.load(open(p));d.pop({key!r},None);json.dump(d,open(p,'w'),indent=2)"
    return f'python3 -c "{code}"' + (" && systemctl restart docker" if restart else "")


def _install(packages: str) -> str:
    return f"apt-get update && apt-get install -y --no-install-recommends {packages}"


# ---- what facts alone tell ----


def quick(m: Measured) -> Findings:
    """All that needs no further look at the hosts."""
    for text in m.inventory.notes():
        if "CLEAR TEXT" in text:
            yield warning("inventory", "encryption", "none", text, "inventory: network.encryption: auto", "")
        else:
            yield note("inventory", "inventory", text)
    for problem in m.refused:
        yield error(
            problem.host or "inventory",
            problem.step or "plan",
            problem.what,
            "bootstrap refuses this",
            problem.hint or "see above",
            "",
        )
    for name, facts in m.facts.items():
        if facts.unreachable:
            spec = m.inventory.hosts[name]
            yield error(
                name, "ssh", facts.unreachable, "nothing can be known or done there",
                f"ssh -p {spec.port} {spec.user}@{spec.address}", "",
            )  # fmt: skip
            continue
        for judge in (_system, _engine, _membership, _own_address, _resolvers):
            yield from judge(m, name, facts)
    yield from _engines_differ(m)
    yield from _unique(m, "host name", lambda name: m.facts[name].hostname, _rename)
    yield from _collisions(m)


def _system(m: Measured, name: str, facts: HostFacts) -> Findings:
    ours = bool({facts.os, *facts.os_like} & set(bootstrap.OURS)) and facts.systemd
    if ours:
        yield ok(name, "operating system", facts.os_name)
    elif facts.engine:
        yield note(name, "operating system", facts.os_name or "unknown", "packages there are yours to install")
    else:
        yield error(
            name, "operating system",
            f"{facts.os_name or 'unknown'}, no Docker{'' if facts.systemd else ' or systemd'}",
            "bootstrap installs packages on Debian and Ubuntu with systemd only", "install Docker there by hand", "",
        )  # fmt: skip
    kernel = engines.version(facts.kernel)
    if kernel is None or kernel[:2] >= OLDEST_KERNEL:
        yield ok(name, "kernel", facts.kernel)
    else:
        yield warning(
            name, "kernel", facts.kernel, "older than any that a supported Debian or Ubuntu brings",
            "apt-get update && apt-get full-upgrade -y && reboot",
        )  # fmt: skip


def _upgrade(facts: HostFacts, probe: Probe | None) -> str:
    package = next((p for p in ("docker-ce", "docker.io") if probe is not None and p in probe.packages), "docker.io")
    return f"apt-get update && apt-get install -y --only-upgrade {package}"


def _engine(m: Measured, name: str, facts: HostFacts) -> Findings:
    what = "engine version"
    if not facts.engine:
        if "dockerd" not in facts.programs:
            yield note(name, "engine", "no Docker yet", "bootstrap installs docker.io")
        elif not facts.unreachable:
            yield warning(
                name, "engine", f"installed, but does not answer (unit {facts.units.get('docker', ('unknown',))[0]})",
                "bootstrap would start it", "systemctl reset-failed docker; systemctl start docker",
            )  # fmt: skip
        return
    probe = m.probes.get(name)
    bad = engines.known_bad(facts.engine)
    debian = (
        "+dfsg" in facts.engine or "ubuntu" in facts.engine or (probe is not None and "docker.io" in probe.packages)
    )
    elsewhere = []
    for entry in bad:
        label = entry.advisory.split(" ")[0]
        applies = entry.where == "all" or m.encryption == "ipsec"
        if entry.where == "firewalld" and applies:
            applies = probe is not None and _firewalld_deletes(probe)
        if label == "CVE-2026-92542" and probe is not None and _sockets_cannot_forge(probe):
            applies = False
        if not applies:
            elsewhere.append(label)
            continue
        why = f"list of known-bad engines of {engines.AS_OF}"
        mend = _upgrade(facts, probe)
        if label == "CVE-2026-92542":
            mend = f"iptables -I OUTPUT -p udp --dport {DATA_PORT} -m owner --socket-exists -j DROP"
            why += "; the advisory gives this rule where no upgrade is to be had"
        elif debian and label.startswith("CVE"):
            why += f"; distributions mend without a new number, see: apt-get changelog docker.io | grep {label}"
        yield Finding(
            Level(entry.level),
            name,
            what,
            f"{facts.engine}: {entry.advisory}, {entry.date}: {entry.reason}",
            why,
            mend,
            name,
        )
    if elsewhere:
        text = f"{facts.engine} falls under {', '.join(elsewhere)} by its number"
        yield note(name, what, text, f"does not matter here: {m.encryption}, rules and firewall as they are")
    if len(elsewhere) == len(bad):
        yield ok(name, what, f"{facts.engine}: nothing of the list of {engines.AS_OF} matters with {m.encryption}")


def _firewalld_deletes(probe: Probe) -> bool:
    if not probe.active("firewalld"):
        return False
    lines = [*probe.lines("firewalld"), "", "", ""]
    backend = next((line for line in lines if line in ("iptables", "nftables")), "nftables")
    direct = next((int(line) for line in reversed(lines) if line.isdecimal()), 0)
    return backend == "iptables" or direct > 0 or (engines.version(lines[0]) or (0, 0, 0)) < (2, 0, 0)


def _sockets_cannot_forge(probe: Probe) -> bool:
    """The rule of the advisory's workaround stands in OUTPUT."""
    for (_, table, chain), rules in probe.firewall.rules.items():
        if (table, chain) == ("filter", "OUTPUT"):
            for rule in rules:
                text = json.dumps(rule["expr"])
                if '"owner"' in text and f'"right": {DATA_PORT}' in text and '"drop"' in text:
                    return True
    return False


def _engines_differ(m: Measured) -> Findings:
    found = {name: facts.engine for name, facts in m.awake.items() if facts.engine}
    majors = {engines.version(text) for text in found.values()}
    if len(majors) > 1:
        newest = max(v for v in majors if v)
        for name, text in found.items():
            if engines.version(text) != newest:
                others = ", ".join(sorted({t for t in found.values() if engines.version(t) == newest}))
                yield warning(
                    name, "engine versions differ", f"{text}, others have {others}",
                    "a Swarm of mixed engines is what nobody tests", _upgrade(m.facts[name], m.probes.get(name)),
                )  # fmt: skip


def _membership(m: Measured, name: str, facts: HostFacts) -> Findings:
    if facts.swarm == "locked":
        yield error(name, "swarm", "locked", "it does nothing until its key is given", "docker swarm unlock", "")
    elif facts.swarm in ("error", "pending"):
        yield warning(
            name, "swarm", f"{facts.swarm} {facts.swarm_error}".strip(), "bootstrap repairs it where it can",
            "fab bootstrap", "",
        )  # fmt: skip
    if facts.live_restore:
        yield _live_restore(name)
    if m.encryption == "ipsec" and facts.esp_came_late:
        yield warning(
            name, "Docker's IPsec", "Docker was started when its kernel had none",
            "it refuses each task on the overlay until it is started anew (bootstrap repairs it)",
            "systemctl restart docker",
        )  # fmt: skip
    if m.encryption != "wireguard" or not facts.mesh.config:
        return
    if not facts.mesh.address:
        yield warning(
            name, "tunnel", "configured, but down", "this host hears nobody of the Swarm (bootstrap repairs it)",
            f"systemctl restart wg-quick@{MESH}",
        )  # fmt: skip
    if not facts.mesh.guarded:
        yield warning(
            name, "guard", "the rule against foreign VXLAN or the blackhole route is not in force",
            "clear text could leave, and forged frames come in (bootstrap repairs it)",
            "/etc/swarmmail/guard apply && systemctl restart swarmmail-guard",
        )  # fmt: skip


def _live_restore(name: str) -> Finding:
    return error(
        name, "daemon configuration", "live-restore is on", "it excludes Swarm: docker swarm init refuses",
        drop_key("live-restore"),
    )  # fmt: skip


def _own_address(m: Measured, name: str, facts: HostFacts) -> Findings:
    address, spec = m.address(name), m.inventory.hosts[name]
    link = facts.link_of(address)
    if link is not None:
        yield ok(name, "address", f"{address} on {link}, MTU {facts.mtus.get(link, 0)}")
        if spec.nat:
            yield note(
                name,
                "address",
                f"nat: true, but {address} is its own on {link}",
                "true when a router before it translates",
            )
    elif spec.nat or m.encryption == "wireguard":
        yield note(
            name, "address", f"{address} is on none of its links", "so a router translates; WireGuard can do with that"
        )
    else:
        own = [
            a
            for k, all_ in facts.addresses.items()
            if k != "lo" and not k.startswith(("docker", "br-", "veth"))
            for a in all_
        ]
        hint = next((a for a in own if ":" not in a), "ADDRESS")
        yield error(
            name, "address", f"advertise {address} is on none of its links (it has {', '.join(own) or 'none'})",
            f"VXLAN and ESP come and go by the host's own address ({m.encryption})",
            f"inventory: hosts.{name}.advertise: {hint}, or network.encryption: wireguard", "",
        )  # fmt: skip
    for other in m.awake:
        if other != name and (at := facts.link_of(m.address(other))) is not None:
            size = 128 if ":" in m.address(other) else 32
            found = next(
                (a.get("prefixlen", size) for k, a in _entries(m, name) if k == at and a["local"] == m.address(other)),
                size,
            )
            yield error(
                name, "address of another host", f"{m.address(other)} on {at} is what {other} advertises",
                f"what is meant for {other} stays here", f"ip addr del {m.address(other)}/{found} dev {at}",
            )  # fmt: skip


def _entries(m: Measured, name: str) -> list[tuple[str, dict[str, Any]]]:
    return m.probes[name].addresses if name in m.probes else []


def _resolvers(m: Measured, name: str, facts: HostFacts) -> Findings:
    if facts.resolvers:
        yield ok(name, "resolvers", ", ".join(facts.resolvers))
        return
    others = [r for f in m.awake.values() for r in f.resolvers if not r.startswith("127.") and r != "::1"]
    server = others[0] if others else "ADDRESS-OF-A-RESOLVER"
    yield warning(
        name, "resolvers", "no nameserver in /etc/resolv.conf", "the MTA there finds no other mail server",
        f"echo 'nameserver {server}' >>/etc/resolv.conf",
    )  # fmt: skip


def _unique(
    m: Measured, what: str, value: Callable[[str], str], mend: Callable[[str], str], on: str = "warning"
) -> Findings:
    first: dict[str, str] = {}
    for name in m.awake:
        found = value(name)
        if found and first.setdefault(found, name) != name:
            shown = found if len(found) < 40 else found[:36] + "..."
            yield Finding(
                Level(on), name, what, f"{shown}, the same as {first[found]}",
                "is it a copy of that machine? What must tell hosts apart is then not the only thing that they share",
                mend(name), name,
            )  # fmt: skip


def _rename(name: str) -> str:
    return f"echo {name} >/etc/hostname && hostname -F /etc/hostname"


def _collisions(m: Measured) -> Findings:
    """Subnets of the overlay and of the tunnel against what each host routes or resolves by."""
    wanted = m.inventory.network
    if m.swarm is None or wanted.name not in m.swarm.networks:
        return
    try:
        overlay = IPv4Network(m.swarm.networks[wanted.name].subnet)
    except ValueError:
        return
    for name, facts in m.awake.items():
        for route in (r for r in facts.routes if r.prefixlen and r.overlaps(overlay)):
            yield error(
                name, "subnets", f"a route to {route} lies in the overlay's {overlay}",
                "containers of the overlay cannot reach it, and the host may answer in their place",
                f"ip route del {route}",
            )  # fmt: skip
        for resolver in (r for r in facts.resolvers if ":" not in r and ip_address(r) in overlay):
            yield error(
                name, "subnets", f"resolver {resolver} lies in the overlay's {overlay}",
                "containers of the overlay cannot reach it",
                "remove the stack and the overlay, set network.subnet in the inventory, then fab bootstrap deploy", "",
            )  # fmt: skip


# ---- what check.sh tells ----


def hosts(m: Measured) -> Findings:
    for name in m.awake:
        probe = m.probes.get(name)
        if probe is None or not probe.complete:
            yield warning(name, "check", "its answer is not complete", "part of it was not looked at", "fab check", "")
        if probe is None:
            continue
        for judge in (_docker, _config, _api, _room, _kernel, _firewalls, _upgrades, _dynamic, _tools, _ports, _pools):
            yield from judge(m, name, probe)
    yield from _clocks(m)
    probes = m.probes
    fresh = "rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup"
    yield from _unique(m, "machine-id", lambda n: probes[n]["machine-id"] if n in probes else "", lambda n: fresh)
    yield from _unique(
        m, "engine id", lambda n: str(probes[n].info.get("ID") or "") if n in probes else "",
        lambda n: f"rm -f {probes[n].info.get('DockerRootDir')}/engine-id && systemctl restart docker",
    )  # fmt: skip
    yield from _unique(
        m, "SSH host key", lambda n: (sorted(probes[n].lines("ssh-keys")) or [""])[0] if n in probes else "",
        lambda n: "rm /etc/ssh/ssh_host_*_key* && ssh-keygen -A && systemctl restart ssh",
    )  # fmt: skip


def _docker(m: Measured, name: str, probe: Probe) -> Findings:
    path = probe["docker-path"]
    if "/snap/" in path or path.endswith("/snap"):
        yield error(
            name, "docker package", f"{path}: a snap", "it is confined: no folders of ours, no unit docker.service",
            "snap remove docker && " + _install("docker.io"),
        )  # fmt: skip
    elif path.endswith("podman"):
        yield error(
            name, "docker package", f"{path}: Podman in Docker's place", "Podman has no Swarm",
            "apt-get remove -y podman-docker && " + _install("docker.io"),
        )  # fmt: skip
    if any("rootless" in str(option) for option in probe.info.get("SecurityOptions") or ()):
        yield error(
            name, "docker package", "rootless", "overlay networks need root",
            "systemctl --user disable --now docker; " + _install("docker.io"),
        )  # fmt: skip
    if probe.info.get("Driver") == "vfs":
        yield warning(
            name, "storage driver", "vfs", "every layer of an image is a whole copy", drop_key("storage-driver")
        )
    active, enabled = probe.units.get("docker", ("", ""))
    if active == "active" and enabled == "disabled":
        yield warning(
            name, "docker at boot", "docker.service is disabled", "after a reboot the host stays away from the Swarm",
            "systemctl enable docker",
        )  # fmt: skip


def _config(m: Measured, name: str, probe: Probe) -> Findings:
    what = "daemon configuration"
    if not probe["docker-path"] and not probe["daemon.json"]:
        return
    if probe.config is None:
        yield error(
            name, what, f"{CONFIG} is no JSON object", "dockerd does not start with it: the next restart is the last",
            f"mv {CONFIG} {CONFIG}.broken",
        )  # fmt: skip
        return
    where = dict.fromkeys(probe.flags, "flag of the unit") | dict.fromkeys(probe.config, CONFIG)
    said = False

    def wrong(key: str, judge: Callable[..., Finding], measured: str, why: str) -> Finding:
        mend = drop_key(key)
        if key not in (probe.config or {}):
            mend = f"take --{key} out of the unit (systemctl cat docker, /etc/default/docker) and restart docker"
            return judge(name, what, f"{measured} ({where[key]})", why, mend, "")
        return judge(name, what, f"{measured} ({where[key]})", why, mend)

    settings = {**probe.flags, **probe.config}
    false, true = (False, "false"), (True, "true", "")
    if settings.get("live-restore") in true and not m.facts[name].live_restore:
        said = True
        yield _live_restore(name)
    for key, bad, judge, why in (
        ("iptables", false, error, "Docker then sets no rule: no encryption, no published port"),
        ("firewall-backend", ("nftables",), error, "Engine 29 refuses Swarm with it (moby#49638)"),
        ("ip-masq", false, warning, "containers then do not reach the outside: no mail leaves"),
        ("ip-forward", false, warning, "containers are then not reached from outside"),
    ):
        if settings.get(key) in bad:
            said = True
            yield wrong(key, judge, f"{key} is {json.dumps(settings[key])}", why)
    if settings.get("userns-remap"):
        said = True
        yield wrong(
            "userns-remap",
            warning,
            "userns-remap is on",
            "volumes are in another folder and owned by other users: not tried",
        )
    if settings.get("no-new-privileges") in true and "no-new-privileges" in settings:
        yield note(name, what, "no-new-privileges is on", "Postfix's sendmail and postdrop need their group")
    if settings.get("experimental") in (True, "true"):
        yield note(name, what, "experimental is on")
    yield from _address_pools(m, name, probe)
    answer = probe.lines("validate")
    if answer and answer[-1] == "status=0":
        if not said:
            yield ok(name, what, "dockerd --validate accepts it; nothing in it excludes Swarm")
    elif answer and "unknown flag: --validate" not in probe["validate"]:
        text = (answer[:-1] or ["no message"])[-1].removeprefix(
            f"unable to configure the Docker daemon with file {CONFIG}: "
        )
        found = re.search(r"(?:configuration file|configuration option): ([\w-]+)", text)
        mend = drop_key(found[1], restart=False) if found else f"mv {CONFIG} {CONFIG}.broken"
        yield error(name, what, text[:160], "dockerd does not start with it: the next restart is the last", mend)


def _needed(m: Measured, name: str) -> dict[str, str]:
    """Addresses that a host must reach by other ways than a network of Docker's, and what they are."""
    used = {r: f"resolver {r}" for r in m.facts[name].resolvers}
    return used | {m.address(other): f"{other}'s address {m.address(other)}" for other in m.awake}


def _address_pools(m: Measured, name: str, probe: Probe) -> Findings:
    pools = (probe.config or {}).get("default-address-pools")
    for pool in pools if isinstance(pools, list) else ():
        try:
            network = ip_network(str(pool.get("base")), strict=False)
        except (ValueError, AttributeError):
            continue
        inside = [label for text, label in _needed(m, name).items() if _holds(network, text)]
        inside += [f"a route to {route}" for route in _foreign_routes(probe) if route.overlaps(network)]
        if inside:
            yield error(
                name, "address pools", f"default-address-pools has {network}, which holds {', '.join(inside)}",
                "a network of Docker's there would cut it off", drop_key("default-address-pools"),
            )  # fmt: skip


def _holds(network: Any, text: str) -> bool:
    try:
        return ip_address(text.split("%")[0]) in network
    except ValueError:
        return False


def _foreign_routes(probe: Probe) -> list[IPv4Network]:
    """Where the host sends packets by links that are not Docker's."""
    found = []
    try:
        for entry in json.loads(probe["route"] or "[]"):
            docker = str(entry.get("dev", "")).startswith(("docker", "br-", "veth"))
            if not docker and entry.get("dst") not in (None, "default"):
                found.append(IPv4Network(entry["dst"], strict=False))
    except (ValueError, TypeError, AttributeError):
        return []
    return found


def _pools(m: Measured, name: str, probe: Probe) -> Findings:
    """Networks that Docker has already, against what the host must reach."""
    for line in probe.lines("docker-nets"):
        network_name, *subnets = line.split() or [""]
        for subnet in subnets:
            try:
                network = ip_network(subnet, strict=False)
            except ValueError:
                continue
            for label in (label for text, label in _needed(m, name).items() if _holds(network, text)):
                mend = f"docker network rm {network_name}"
                if network_name == "bridge":
                    mend = f'put "bip" with another subnet into {CONFIG}, then systemctl restart docker'
                yield error(
                    name, "subnets", f"Docker's network {network_name} {subnet} holds {label}",
                    "this host cannot reach it", mend, "" if network_name == "bridge" else name,
                )  # fmt: skip


def _api(m: Measured, name: str, probe: Probe) -> Findings:
    server = printed.json_object(probe["version"])
    found = engines.version(str(server.get("ApiVersion", "")))
    if found is None:
        return
    text = f"{server.get('MinAPIVersion', '?')} to {server['ApiVersion']}"
    if found[:2] >= engines.OLDEST_API:
        yield ok(name, "engine API", text)
    else:
        yield error(
            name, "engine API", text, "swarmmail speaks 1.41 and later (Engine 20.10)", _upgrade(m.facts[name], probe)
        )


def _room(m: Measured, name: str, probe: Probe) -> Findings:
    words = probe["disk"].split()
    if len(words) == 6 and words[0].isdecimal():
        free, size, inodes, all_inodes = (int(word) if word.isdecimal() else 0 for word in words[:4])
        text = f"{free / 2**30:.1f} GiB free of {size / 2**30:.0f} at {words[5]} ({words[4]})"
        mend = "docker image prune -af; journalctl --vacuum-size=100M; apt-get clean"
        why = "images and mail have no room; a full disk stops Docker and the queue"
        if words[4] in ("nfs", "nfs4", "cifs", "fuse.sshfs"):
            yield error(
                name,
                "disk",
                text,
                "Docker's folder is on a network file system",
                "set data-root in daemon.json to a local disk",
                "",
            )
        elif free < DISK_ERROR:
            yield error(name, "disk", text, why, mend)
        elif free < DISK_WARNING:
            yield warning(name, "disk", text, why, mend)
        else:
            yield ok(name, "disk", text)
        if all_inodes and inodes < all_inodes * 0.03:
            yield warning(
                name,
                "inodes",
                f"{inodes} of {all_inodes} free at {words[5]}",
                "a mailbox has a file for each mail",
                mend,
            )
    memory = {key: int(value) * 1024 for key, value in probe.values("memory").items() if value.isdecimal()}
    if "MemAvailable" in memory:
        free = memory["MemAvailable"]
        text = f"{free / 2**20:.0f} of {memory.get('MemTotal', 0) / 2**20:.0f} MiB available"
        if free < MEMORY_WARNING:
            level = error if free < MEMORY_ERROR else warning
            yield level(
                name, "memory", text, "Docker, Postfix and Dovecot together take about 190 MiB",
                "fallocate -l 1G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile",
            )  # fmt: skip
        else:
            yield ok(name, "memory", text)


_ABILITIES = {  # ability: (back ends that need it, what it is, package or module)
    "vxlan": (("ipsec", "none", "wireguard"), "a VXLAN link", "vxlan"),
    "bridge": (("ipsec", "none", "wireguard"), "a bridge", "bridge"),
    "veth": (("ipsec", "none", "wireguard"), "a veth pair", "veth"),
    "nat": (("ipsec", "none", "wireguard"), "an iptables rule with MASQUERADE", "xt_MASQUERADE"),
    "esp": (("ipsec",), "an ESP state with AES-GCM", "esp4 gcm seqiv"),
    "policy": (("ipsec",), "an iptables rule with -m policy", "xt_policy"),
    "mark": (("ipsec",), "an iptables rule with -j MARK", "xt_mark"),
    "nft": (("wireguard",), "the guard's nftables rule", "nf_tables"),
}


def _kernel(m: Measured, name: str, probe: Probe) -> Findings:
    """Only what was tried and refused is a finding; without iptables or nft (before bootstrap) it is a note."""
    kernel, what = probe.kernel, "kernel"
    if "namespace" in kernel or not kernel:
        yield note(
            name, what, f"not tried: {kernel.get('namespace', 'no answer')}", "abilities show when the overlay is made"
        )
        return
    missing, untried = [], []
    for ability, (back_ends, text, modules) in _ABILITIES.items():
        reason = kernel.get(ability)
        if m.encryption not in back_ends or not reason:
            continue
        if "not found" in reason and any(tool in reason for tool in ("iptables:", "nft:")):
            untried.append(text)
            continue
        missing.append(ability)
        yield error(
            name, what, f"does not take {text}: {reason[:90]}", "nothing of the overlay would pass, or in clear text",
            f"modprobe -a {modules} || {{ {_install('linux-modules-extra-$(uname -r)')}; }}",
        )  # fmt: skip
    if m.encryption == "ipsec" and kernel.get("bpf") and kernel.get("u32") and "not found" not in kernel["bpf"]:
        missing.append("bpf")
        yield error(
            name, what, f"takes neither -m bpf nor -m u32: {kernel['bpf'][:90]}",
            "Docker selects what to encrypt by one of them: without, nothing is (moby#43382)", "modprobe xt_bpf",
        )  # fmt: skip
    if m.encryption == "wireguard" and kernel.get("wireguard") and kernel.get("tun"):
        missing.append("tun")
        yield error(
            name, what, f"neither WireGuard ({kernel['wireguard'][:60]}) nor TUN ({kernel['tun'][:60]})",
            "there is no tunnel without one of them", "modprobe wireguard || modprobe tun",
        )  # fmt: skip
    if not missing:
        tried = [a for a, (b, *_) in _ABILITIES.items() if m.encryption in b and kernel.get(a) == ""]
        if m.encryption == "wireguard":
            tried.append("WireGuard" if not kernel.get("wireguard") else "TUN for wireguard-go")
        yield ok(name, what, f"made and took away: {', '.join(tried)}")
    if untried:
        yield note(name, what, f"not tried, its program is missing: {', '.join(untried)}", "bootstrap installs it")
    if not probe["ipvs"]:
        yield note(
            name,
            "IPVS",
            "not in the kernel",
            "needed for endpoint_mode vip and ports of the mesh; the mail stack uses neither",
        )


def _firewalls(m: Measured, name: str, probe: Probe) -> Findings:
    legacy = [line for line in probe.lines("legacy") if line.startswith("-A")]
    uses_nft = "nf_tables" in probe["iptables"]
    modern = any(
        family in ("ip", "ip6") and table in ("filter", "nat", "mangle") for family, table, _ in probe.firewall.rules
    )
    if legacy and (uses_nft or modern) and probe["iptables"]:
        yield warning(
            name, "iptables flavours", f"{len(legacy)} rules of iptables-legacy beside those of iptables-nft",
            "two filters decide, and each tool shows one: a drop in the other is not seen",
            "for t in $(cat /proc/net/ip_tables_names); do iptables-legacy -t $t -F; iptables-legacy -t $t -X; done",
        )  # fmt: skip
    managers = [u for u in ("ufw", "firewalld", "netfilter-persistent") if probe.active(u)]
    if probe["ufw"].startswith("Status: active"):
        managers = [*dict.fromkeys([*managers, "ufw"])]
    if "ufw" in managers and not probe["ufw"].startswith("Status: active"):
        managers.remove("ufw")  # its unit is active also when the firewall is not
    for manager in managers:
        yield note(
            name,
            "firewall",
            f"{manager} is active",
            "what it drops of ours shows below; mend it there, not behind its back",
        )
    enabled = probe.units.get("nftables", ("", ""))
    if probe["nftables.conf"] and ("active" in enabled[:1] or enabled[1] == "enabled"):
        yield warning(
            name, "firewall", "nftables.service is on and its file begins with 'flush ruleset'",
            "each reload takes Docker's rules away, those of its encryption too",
            "sed -i 's/^flush ruleset/table inet filter\\ndelete table inet filter/' /etc/nftables.conf",
        )  # fmt: skip
    if probe.active("fail2ban"):
        yield note(
            name,
            "firewall",
            "fail2ban is active",
            "it sees the clients of the MTA only if it reads the containers' logs",
        )
    at = probe.firewall.accepts(Packet("udp", DATA_PORT, "192.0.2.1", iif="eth0"))
    if m.encryption == "ipsec" and at is not None:
        yield warning(
            name, "data port", f"a rule lets UDP {DATA_PORT} in for all, before Docker's own: {at.text}",
            "forged clear frames come in (CVE-2023-28840, GHSA-vwm3-crmr-xfxw)",
            f"nft delete rule {at.place} handle {at.handle}",
        )  # fmt: skip


def _upgrades(m: Measured, name: str, probe: Probe) -> Findings:
    apt = probe["apt"]
    on = "unattended-upgrades=installed" in apt and re.search(r'^APT::Periodic::Unattended-Upgrade "[1-9]', apt, re.M)
    if not on or "timer=masked" in apt or "timer=disabled" in apt:
        return
    held = set(probe.lines("held"))
    black = re.findall(r'Package-Blacklist::? "([^"]+)"', apt)
    engine = [
        p for p in probe.packages
        if p in ("docker.io", "docker-ce", "containerd", "containerd.io", "runc")
        and p not in held and not any(re.match(pattern, p) for pattern in black)
    ]  # fmt: skip
    if not engine:
        yield ok(name, "unattended upgrades", "on; Docker's packages are held")
        return
    pending = [p for p in engine if probe.packages[p][0] != probe.packages[p][1]]
    text = f"on, and not held: {', '.join(engine)}"
    yield warning(
        name, "unattended upgrades", text + (f"; pending: {', '.join(pending)}" if pending else ""),
        "an upgrade stops every container of the host, at an hour of its own choice",
        f"apt-mark hold {' '.join(engine)}",
    )  # fmt: skip


def _dynamic(m: Measured, name: str, probe: Probe) -> Findings:
    for link, entry in probe.addresses:
        if entry["local"] == m.address(name) and entry.get("dynamic"):
            yield warning(
                name, "address", f"{entry['local']} on {link} is lent by DHCP, for {entry.get('valid_life_time')} s",
                "if it changes, the node is lost: reserve it at the DHCP server; until the next lease this does",
                f"ip addr change {entry['local']}/{entry['prefixlen']} dev {link} "
                "valid_lft forever preferred_lft forever",
            )  # fmt: skip


def _tools(m: Measured, name: str, probe: Probe) -> Findings:
    if not probe["python"]:
        yield warning(
            name, "python3", "missing", "the pairs with this host cannot be measured", _install("python3-minimal")
        )
    elif (engines.version(probe["python"]) or (0, 0, 0)) < (3, 9, 0):
        yield warning(name, "python3", probe["python"], "the pairs need 3.9", "upgrade that host's system", "")
    if "tcpdump" not in probe.programs:
        yield warning(name, "tcpdump", "missing", "the wire cannot be looked at (fab verify)", _install("tcpdump"))


_SERVICES = {"exim4": "exim4", "master": "postfix", "smtpd": "opensmtpd", "sendmail": "sendmail", "dovecot": "dovecot"}


def _stop(socket: Socket) -> str:
    if socket.process in _SERVICES:
        return f"systemctl disable --now {_SERVICES[socket.process]}"
    return f"kill {socket.pid}"


def _ports(m: Measured, name: str, probe: Probe) -> Findings:
    """Ports that we need and a foreign program has."""
    docker = ("dockerd", "docker-proxy", "")  # a socket of the kernel has no process: VXLAN, WireGuard
    needed = [("tcp", CONTROL_PORT), ("tcp", GOSSIP_PORT), ("udp", GOSSIP_PORT), ("udp", DATA_PORT)]
    if m.encryption == "wireguard" and (tunnel := m.inventory.tunnel_port(name)):
        needed.append(("udp", tunnel))
    busy = []
    for proto, port in needed:
        for socket in probe.sockets:
            local = socket.address.startswith("127.") or socket.address == "::1"
            if (
                (socket.proto, socket.port) == (proto, port)
                and socket.process not in (*docker, "wireguard-go")
                and not local
            ):
                busy.append(port)
                yield error(
                    name, "ports", f"{proto.upper()} {port} is in use by {socket.process} (process {socket.pid})",
                    "Docker's Swarm or the tunnel needs it", _stop(socket),
                )  # fmt: skip
    ours = m.swarm is not None and m.facts[name].swarm == "active"
    for published in m.published:
        for port in published.ports:
            for socket in probe.sockets:
                if socket.proto != "tcp" or socket.port != port or (ours and socket.process in docker):
                    continue
                busy.append(port)
                judge = error if published.host == name else warning
                end = _stop(socket)
                if socket.process in docker:
                    end = f"docker rm -f $(docker ps -q --filter publish={port})"
                by = socket.process or "a container or the kernel"
                yield judge(
                    name, "published ports", f"TCP {port} ({published.service}) is in use by {by} at {socket.address}",
                    "the service cannot start there" if published.host == name else "the service cannot be moved there",
                    end,
                )  # fmt: skip
                break
    if not busy:
        ports = sorted({str(port) for p in m.published for port in p.ports}, key=int)
        yield ok(
            name, "ports", "free or ours: " + ", ".join([f"{p} {n}" for p, n in needed] + [f"tcp {n}" for n in ports])
        )


def _clocks(m: Measured) -> Findings:
    if m.clocks:
        ahead = [offset for offset, _ in m.clocks.values()]
        if len(ahead) % 2 == 0:  # this machine has a vote: of two clocks, neither can say which one is wrong
            ahead.append(0.0)
        middle = sorted(ahead)[len(ahead) // 2]
        for name, (offset, uncertain) in m.clocks.items():
            apart = offset - middle
            text = f"{apart:+.2f} s from the others' middle, +-{uncertain:.2f} s"
            sure = max(0.0, abs(apart) - uncertain)
            why = "certificates of the Swarm are not valid yet, or tunnels refuse old handshakes"
            mend = f"date -s @$(( $(date +%s) - ({round(apart)}) )) && timedatectl set-ntp true"
            if sure > CLOCK_ERROR:
                yield error(name, "clock", text, why, mend)
            elif sure > CLOCK_WARNING:
                yield warning(name, "clock", text, why, mend)
            else:
                yield ok(name, "clock", text)
    for name, probe in m.probes.items():
        values = probe.values("time")
        if values.get("daemon"):
            yield ok(name, "time synchronisation", values["daemon"])
        elif probe["container"] not in ("", "none"):
            yield note(
                name,
                "time synchronisation",
                f"none, but the host is a container ({probe['container']})",
                "its machine sets the clock",
            )
        else:
            yield warning(
                name, "time synchronisation", "none", "clocks drift apart, until certificates fail",
                f"{_install('systemd-timesyncd')} && timedatectl set-ntp true",
            )  # fmt: skip


def managers_of(hosts_: Mapping[str, Probe]) -> dict[str, list[str]]:
    """Firewall managers by host, for the mend of what they drop."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, probe in hosts_.items():
        if probe["ufw"].startswith("Status: active"):
            found[name].append("ufw")
        if probe.active("firewalld"):
            found[name].append("firewalld")
    return found
