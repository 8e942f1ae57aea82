"""``fab check``: gather from the hosts what ``model/check.py`` judges. Changes nothing that stays.

Two rounds: facts, ``check.sh`` and the clock of every host at once; then an agent (``probe.py``) on every host, all
pairs at once. The agents are led step by step by this module, over one SSH channel each.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import resources
from typing import Any

import paramiko

from swarmmail import report
from swarmmail.hosts.connection import Host
from swarmmail.hosts.facts import gather_all
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import bootstrap as model
from swarmmail.model import check as judge
from swarmmail.model import check_mail, check_pair
from swarmmail.model import network as net
from swarmmail.model.bootstrap import Observed
from swarmmail.model.check import Measured, Probe, Published
from swarmmail.model.check_pair import End
from swarmmail.model.errors import HostError, InputError, SwarmmailError
from swarmmail.model.facts import HostFacts
from swarmmail.model.findings import Finding, Level
from swarmmail.model.inventory import Inventory
from swarmmail.model.patience import patient
from swarmmail.model.placement import known_host
from swarmmail.model.stack import read
from swarmmail.model.swarm import Swarm

_SCRIPT = resources.files(__package__).joinpath("check.sh").read_text()
_AGENT = resources.files(__package__).joinpath("probe.py").read_bytes()
STEP = "check pairs"
TRANSFER = 7  # seconds for 1 MB, once connected
PATIENCE = TRANSFER + 21  # seconds for the answer: the agent tries for 17 to connect
ELECTION = patient(30)  # seconds to wait for one: what keeps managers apart is seen by looking between the hosts
LIFE = 80  # seconds: an agent whose operator is gone ends itself


def quick(inventory: Inventory, observed: Observed) -> list[Finding]:
    """What can be told without a look at the hosts beyond their facts."""
    return list(judge.quick(_measured(inventory, observed)))


def run(fleet: Fleet, smtp: str | None = None, observed: Observed | None = None) -> list[Finding]:
    """Look at all hosts and between them.

    Args:
        smtp: a mail server to try port 25 at, from the hosts.
        observed: what was observed a moment ago, if it was.
    """
    report.progress("looking at the hosts")
    observed, probes, clocks, problems = _hosts(fleet, observed)
    m = _measured(fleet.inventory, observed)
    m = replace(m, probes=probes, clocks=clocks, refused=(*problems, *m.refused))
    report.progress(f"looking between the hosts ({m.encryption})")
    found = [*judge.quick(m), *judge.hosts(m), *_pairs(fleet, m)]
    found += check_mail.findings(m, _ask_dns(m), _smtp(fleet, m, smtp) if smtp else {})
    return found


def show(found: list[Finding]) -> None:
    """A table of everything, then each warning and error with its reason and what mends it."""
    order = list(Level)
    rows = sorted(found, key=lambda f: (order.index(f.level), f.where, f.what))
    report.table("check", ["", "where", "what", "measured"], [(f.level, f.where, f.what, f.measured) for f in rows])
    for f in rows:
        if f.level in (Level.WARNING, Level.ERROR):
            report.result(f"{f.level}: {f.where}, {f.what}: {f.measured}", good=False)
            report.result(f"  why: {f.why}")
            report.result(f"  mend{' on ' + f.on if f.on else ''}: {f.mend}")


# ---- the hosts ----


def _hosts(
    fleet: Fleet, observed: Observed | None
) -> tuple[Observed, dict[str, Probe], dict[str, tuple[float, float]], list[SwarmmailError]]:
    problems: list[SwarmmailError] = []
    probes: dict[str, Probe] = {}
    clocks: dict[str, tuple[float, float]] = {}

    def probe(host: Host) -> None:
        with contextlib.suppress(HostError):  # the facts say why
            began = time.time()
            there = host.run("date +%s.%N", step="read the clock", timeout=10, check=False).stdout
            ended = time.time()  # the connection may have been opened: then the second one counts
            if ended - began > 0.2:
                began = time.time()
                there = host.run("date +%s.%N", step="read the clock", timeout=10, check=False).stdout
                ended = time.time()
            with contextlib.suppress(ValueError):
                clocks[host.name] = (float(there) - (began + ended) / 2, (ended - began) / 2)
            probes[host.name] = Probe(host.run("sh -s", stdin=_SCRIPT, step="check", timeout=60, check=False).stdout)

    job = threading.Thread(target=lambda: fleet.each(probe))
    job.start()
    if observed is None:
        observed = _observe(fleet, problems)
    job.join()
    return observed, probes, clocks, problems


def _observe(fleet: Fleet, problems: list[SwarmmailError]) -> Observed:
    """Of all hosts what each says, also when no manager answers for the Swarm: then that is one of the ``problems``."""
    from swarmmail.cluster import bootstrap  # it asks for checks itself: not at the top

    facts: dict[str, HostFacts] = {}

    def look() -> Observed:
        facts.update(gather_all(fleet, strict=False))
        return Observed(facts, bootstrap.look_at_swarm(fleet, facts))

    try:
        return bootstrap.after_the_election(look, ELECTION)
    except SwarmmailError as error:
        problems.append(error)
        return Observed(facts)


def _measured(inventory: Inventory, observed: Observed) -> Measured:
    refused: list[SwarmmailError] = []
    awake = {name: facts for name, facts in observed.hosts.items() if not facts.unreachable}
    design: model.Design | None = None
    try:
        if len(awake) == len(observed.hosts):
            design = model.design(inventory, observed, {})
            model.plan(design)
    except SwarmmailError as error:
        if "live-restore" not in error.what:  # it has a finding of its own
            refused.append(error)
    return Measured(
        inventory,
        observed.hosts,
        swarm=observed.swarm,
        encryption=design.encryption if design is not None else _encryption(inventory, observed),
        design=design,
        refused=tuple(refused),
        published=_published(inventory, observed.swarm),
    )


def _encryption(inventory: Inventory, observed: Observed) -> str:
    """The back end as far as it is known without a design."""
    if inventory.network.encryption != "auto":
        return inventory.network.encryption
    with contextlib.suppress(SwarmmailError):
        return net.choose_encryption(inventory, {n: f for n, f in observed.hosts.items() if not f.unreachable}, None)[0]
    return "wireguard"


def _published(inventory: Inventory, swarm: Swarm | None) -> tuple[Published, ...]:
    if inventory.stack is None:
        return ()
    try:
        file = read(inventory)
    except (InputError, OSError):
        return ()  # deploy tells what is wrong with it
    return tuple(
        Published(service.name, service.ports, known_host(service, inventory, swarm) or None)
        for service in file.services.values()
        if service.ports
    )


# ---- between the hosts ----


class Agent:
    """``probe.py`` at work on a host. Ends with the block, whatever happens."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._buffer = b""

    def __enter__(self) -> Agent:
        prefix, password = self.host.as_root()
        loader = f"import sys;source=sys.stdin.buffer.read({len(_AGENT)});exec(compile(source,'probe','exec'))"
        command = f"{prefix}timeout -k 3 {LIFE} python3 -I -S -W ignore -c {shlex.quote(loader)}"
        try:
            self._channel = self.host.transport.open_session(timeout=10)
            self._channel.settimeout(10)
            self._channel.exec_command(command)
            self._channel.sendall(password + _AGENT)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostError(f"connection lost ({error})", host=self.host.name, step=STEP) from None
        return self

    def __exit__(self, *_: object) -> None:
        """The end of its input makes it take away what it made; then it ends."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.shutdown_write()
            self._channel.settimeout(5)
            while self._channel.recv(4096):
                pass
        self._channel.close()

    def ask(self, request: Mapping[str, Any], timeout: float = 10) -> dict[str, Any]:
        """One request, one answer. Raises HostError."""
        try:
            self._channel.settimeout(timeout)
            self._channel.sendall(json.dumps(request).encode() + b"\n")
            while b"\n" not in self._buffer:
                chunk = self._channel.recv(65536)
                if not chunk:
                    said = self._channel.recv_stderr(2000).decode(errors="replace").strip().splitlines()
                    raise HostError(f"its agent ended: {(said or ['no message'])[-1]}", host=self.host.name, step=STEP)
                self._buffer += chunk
        except (OSError, EOFError) as error:
            raise HostError(
                f"its agent does not answer ({error or 'time over'})", host=self.host.name, step=STEP
            ) from None
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if answer.get("error"):
            raise HostError(str(answer["error"]), host=self.host.name, step=STEP)
        return answer


class _Round:
    """All agents, led in step. A host whose agent fails drops out, with the reason."""

    def __init__(self, fleet: Fleet, agents: dict[str, Agent], ends: dict[str, End]) -> None:
        self.fleet, self.agents, self.ends = fleet, agents, ends

    def ask(self, request: Callable[[str], Mapping[str, Any]], timeout: float = 10) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}

        def one(host: Host) -> None:
            try:
                answers[host.name] = self.agents[host.name].ask(request(host.name), timeout)
            except HostError as error:
                self.ends[host.name] = replace(self.ends[host.name], error=error.what)

        self.fleet.each(one, [name for name in self.agents if not self.ends[name].error])
        return answers

    def ask_tunnel(self, request: Callable[[str], Mapping[str, Any]], timeout: float = 10) -> dict[str, dict[str, Any]]:
        """As ``ask``, but a failure leaves the rest of what was measured."""
        before = dict(self.ends)
        answers = self.ask(request, timeout)
        for name, end in self.ends.items():
            if end.error and not before[name].error:
                self.ends[name] = replace(before[name], untried=f"{name}: {end.error}")
        return answers


def _pairs(fleet: Fleet, m: Measured) -> Iterator[Finding]:
    ends: dict[str, End] = {}
    for name in m.awake:
        probe = m.probes.get(name)
        ends[name] = End(error=check_pair.NO_PYTHON if probe is None or not probe["python"] else "")
    with contextlib.ExitStack() as stack:
        agents: dict[str, Agent] = {}
        for name in m.awake:
            if not ends[name].error:
                try:
                    agents[name] = stack.enter_context(Agent(fleet[name]))
                except HostError as error:
                    ends[name] = End(error=error.what)
        if len(agents) > 1:
            _measure(_Round(fleet, agents, ends), m)
    return check_pair.judge(m, ends)


def _measure(all_: _Round, m: Measured) -> None:
    token, ends = secrets.token_hex(8), all_.ends
    v6 = ":" in m.address(next(iter(m.awake)))
    ready = all_.ask(lambda name: {"me": name, "token": token, "v6": v6, "tcp": check_pair.tcp_ports(m)})
    for name, answer in ready.items():
        ends[name] = replace(ends[name], ports=answer["ports"])
    sent = all_.ask(lambda name: {"do": "send", "targets": check_pair.targets(m, name, ends)}, 15)
    for name, answer in sent.items():
        ends[name] = replace(ends[name], sent=answer["sent"])
    _arrived(all_, 0.3)
    if not check_pair.all_arrived(m, ends):  # a busy host may read late, or lose what came in a burst: once more
        all_.ask(lambda name: {"do": "send", "targets": check_pair.datagrams(m, name, ends)}, 15)
        _arrived(all_, 1.0)
    _transfer(all_, m, v6)


def _arrived(all_: _Round, wait: float) -> None:
    """What has arrived so far, after so many seconds."""
    for name, answer in all_.ask(lambda name: {"do": "report", "wait": wait}).items():
        found = {(kind, sender, port): (source, own) for kind, sender, port, source, own in answer["seen"]}
        all_.ends[name] = replace(all_.ends[name], seen=found, largest=answer["largest"])


def _transfer(all_: _Round, m: Measured, v6: bool) -> None:
    """1 MB of TCP each way through a throw-away tunnel of the kind that the overlay will use."""
    ends = all_.ends
    names = [name for name in all_.agents if not ends[name].error]
    if all(check_pair.tunnel_address(m, name) for name in names) and len(names) > 1:
        _running_tunnel(all_, m, names)
        return
    why = _no_tunnel(m, names, v6)
    if why or len(names) < 2:
        for name in names:
            ends[name] = replace(ends[name], untried=why or "no other host")
        return
    inner = {name: f"192.0.0.{20 + number}" for number, name in enumerate(names)}  # RFC 6890; in empty namespaces
    mtu = m.design.underlay_mtu if m.design is not None else net.underlay_mtu(m.awake, m.inventory)
    keys: dict[str, str] = {}
    if m.encryption == "wireguard":
        made = all_.ask_tunnel(lambda name: {"do": "wireguard", "port": m.inventory.tunnel_port(name)})
        keys = {name: answer["key"] for name, answer in made.items()}
        mtu -= net.WIREGUARD_OVERHEAD
    else:
        requests = _vxlan(m, names)
        made = all_.ask_tunnel(lambda name: requests[name])
        mtu -= 50 + (40 if m.encryption == "ipsec" else 0)  # VXLAN; ESP with its padding
    peers = {
        name: [
            {
                "key": keys.get(other, ""),
                "inner": inner[other],
                "endpoint": f"{m.address(other)}:{port}" if (port := m.inventory.tunnel_port(other)) else "",
                "keepalive": m.inventory.hosts[name].nat or m.inventory.hosts[other].nat,
            }
            for other in made
            if other != name
        ]
        for name in made
    }
    if len(made) < 2:
        return
    up = all_.ask_tunnel(
        lambda name: (
            {"do": "up", "address": f"{inner[name]}/24", "mtu": mtu, "peers": peers.get(name, [])}
            if name in made
            else {"do": "report", "wait": 0}
        )
    )
    ready = [name for name in made if name in up]
    # Two handshakes that cross may both be lost, and WireGuard tries again after 5 s: so first one side opens, and a
    # host behind NAT is always that side.
    ready.sort(key=lambda name: not m.inventory.hosts[name].nat)
    for first in (True, False):
        turn = {
            name: {o: inner[o] for o in ready if (ready.index(o) > ready.index(name)) is first and o != name}
            for name in ready
        }
        turn = {a: {b: at for b, at in to.items() if check_pair.passes(m, a, b, ends)} for a, to in turn.items()}
        done = all_.ask_tunnel(
            lambda name, turn=turn: (
                {"do": "transfer", "wait": TRANSFER, "peers": turn[name]}  # type: ignore[misc]
                if turn.get(name)
                else {"do": "report", "wait": 0}
            ),
            PATIENCE,
        )
        for name, answer in done.items():
            ends[name] = replace(ends[name], transfers={**ends[name].transfers, **answer.get("transfers", {})})


def _running_tunnel(all_: _Round, m: Measured, names: list[str]) -> None:
    """Its port is taken by the tunnel that runs: so the transfer goes through that one."""
    served = all_.ask_tunnel(lambda name: {"do": "serve", "address": check_pair.tunnel_address(m, name)})
    for name, answer in served.items():
        all_.ends[name] = replace(all_.ends[name], serves=answer["port"])
    done = all_.ask_tunnel(
        lambda name: {
            "do": "fetch",
            "wait": TRANSFER,
            "peers": {o: (check_pair.tunnel_address(m, o), served[o]["port"]) for o in served if o != name},
        },
        PATIENCE,
    )
    for name, answer in done.items():
        all_.ends[name] = replace(all_.ends[name], transfers=answer["transfers"])


def _no_tunnel(m: Measured, names: list[str], v6: bool) -> str:
    if m.encryption != "wireguard" and v6:
        return "VXLAN over IPv6 is not tried"
    if m.encryption == "wireguard":
        for name in names:
            probe, port = m.probes[name], m.inventory.tunnel_port(name)
            if port and any(s.proto == "udp" and s.port == port for s in probe.sockets):
                return f"UDP {port} of {name} is in use, by the running tunnel"
            if "wg" not in probe.programs:
                return f"no wireguard-tools on {name} yet"
            if probe.kernel.get("wireguard") and "wireguard-go" not in probe.programs:
                return f"no wireguard-go on {name} yet"
    if m.encryption == "ipsec" and any(not m.facts[name].esp for name in names):
        return "a kernel without ESP is among them"
    return ""


def _vxlan(m: Measured, names: list[str]) -> dict[str, dict[str, Any]]:
    """What each host's agent is to make. With ESP the port is one of our own, so that the throw-away policies meet no
    packet of another; the kernel ends states and policies after half a minute, should the agent not."""
    vni = 0x800000 | secrets.randbelow(0x7FFFFF)
    port = net.DATA_PORT if m.encryption == "none" else check_pair.TRY_PORT
    add: dict[str, list[str]] = {name: [] for name in names}
    delete: dict[str, list[str]] = {name: [] for name in names}
    if m.encryption == "ipsec":
        for a in names:
            for b in names:
                if a == b:
                    continue
                way = f"src {m.address(a)} dst {m.address(b)}"
                spi, reqid = 0x80000000 | secrets.randbelow(0x7FFFFFFF), secrets.randbelow(1 << 30) + 1
                state = f"{way} proto esp spi {spi:#x}"
                cipher = f"aead rfc4106(gcm(aes)) 0x{secrets.token_hex(20)} 128"
                for host in (a, b):
                    add[host].append(f"xfrm state add {state} reqid {reqid} mode transport {cipher} limit time-hard 30")
                    delete[host].append(f"xfrm state del {state}")
                add[a].append(
                    f"xfrm policy add {way} proto udp dport {port} dir out limit time-hard 30 "
                    f"tmpl {way} proto esp reqid {reqid} mode transport"
                )
                delete[a].append(f"xfrm policy del {way} proto udp dport {port} dir out")
    return {
        name: {
            "do": "vxlan",
            "vni": vni,
            "port": port,
            "peers": [m.address(other) for other in names if other != name],
            "states": {"add": add[name], "delete": delete[name]} if m.encryption == "ipsec" else None,
        }
        for name in names
    }


# ---- mail ----

DNS_TIMEOUT = 3  # seconds for all questions together


def _ask_dns(m: Measured) -> check_mail.Answers | None:
    """Ask on this machine, as a stranger would; None when there is nothing that the world could know."""
    names = check_mail.names(m)
    if names is None or check_mail.is_reserved(names.hostname):
        return None
    answers: dict[str, Any] = {}

    def addresses() -> None:
        try:
            found = socket.getaddrinfo(names.hostname, 25, type=socket.SOCK_STREAM)
            answers["addresses"] = frozenset(str(entry[4][0]) for entry in found)
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                answers["addresses"] = frozenset()

    def pointer() -> None:
        try:
            answers["pointer"] = socket.gethostbyaddr(names.address)[0]
        except socket.herror as error:
            if error.errno == 1:  # HOST_NOT_FOUND (netdb.h); others: could not be asked
                answers["pointer"] = ""
        except OSError:
            pass

    def mx() -> None:
        if names.domain and shutil.which("dig"):
            words = ["dig", "+short", f"+time={DNS_TIMEOUT}", "+tries=1", names.domain, "MX"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=DNS_TIMEOUT + 2, check=False)
            if done.returncode == 0:
                found = [line.split()[1] for line in done.stdout.splitlines() if len(line.split()) == 2]
                answers["mx"] = tuple(name.rstrip(".").lower() for name in found)

    threads = [threading.Thread(target=work, daemon=True) for work in (addresses, pointer, mx)]
    until = time.monotonic() + DNS_TIMEOUT
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return check_mail.Answers(**answers)


def _smtp(fleet: Fleet, m: Measured, server: str) -> dict[str, str]:
    """Host to what a connection to port 25 of a mail server came to: its greeting, or why there was none."""
    code = (
        "import socket,sys\n"
        "try:\n"
        "    s = socket.create_connection((sys.argv[1], 25), timeout=8); s.settimeout(8)\n"
        "    print(s.recv(100).decode(errors='replace').strip() or 'no greeting')\n"
        "except OSError as error: print('failed:', error)\n"
    )

    def one(host: Host) -> str:
        done = host.run(
            f"python3 -I -S - {shlex.quote(server)}",
            stdin=code,
            step="try port 25",
            timeout=20,
            check=False,
            root=False,
        )
        return done.stdout.strip() or "failed: no python3"

    return fleet.each(one, m.awake)
