"""Verify: is what the tasks of the mail network say to each other really encrypted between their hosts?

A marker goes from task to task while both hosts' links are captured; the same marker goes once in clear, so that a
capture that finds nothing is known to be able to find something; and packets are forged, to see that none is taken.
``wire/judge.py`` reads the captures, ``wire/verdict.py`` says what they mean.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import tenacity

from swarmmail import report
from swarmmail.cluster import bootstrap
from swarmmail.hosts.connection import Host
from swarmmail.hosts.dockerapi import at_once
from swarmmail.hosts.facts import gather_all
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import probe, services
from swarmmail.mail.accounts import Accounts
from swarmmail.model import stack
from swarmmail.model.bootstrap import Observed
from swarmmail.model.errors import HostError, SwarmmailError
from swarmmail.model.facts import MESH, HostFacts
from swarmmail.model.inventory import Inventory
from swarmmail.model.network import DATA_PORT
from swarmmail.model.patience import patient
from swarmmail.wire import capture, judge, verdict
from swarmmail.wire.capture import Captured
from swarmmail.wire.judge import Question
from swarmmail.wire.state import State
from swarmmail.wire.verdict import Backend, End, Evidence, Forgery, Verdict

Hosts = Mapping[str, HostFacts]
Pair = tuple[End, End]
"""Who speaks, and who hears."""
SERVICE = "com.docker.swarm.service.name"
"""Docker's label on a task's container."""
PORTS = {"mta": 25, "mda": 24}
"""Where the tasks of a role listen in the overlay: SMTP and LMTP."""
PATIENCE = patient(75)
"""Seconds in which a service that was restarted is there again."""
NOBODY_LISTENS = 9  # the discard service (RFC 863)
TIMES = 12
"""Lines with the marker in a conversation."""
LETTER = 10_000_000  # bytes
STRANGER = "192.0.2.77"
"""An address of nobody (RFC 5737), as a stranger's."""
OVERHEAD = 50  # bytes of VXLAN over IPv4 (RFC 7348)


@dataclass(frozen=True)
class Plan:
    """Who speaks with whom, and what each packet is known by."""

    ends: tuple[End, ...]
    pairs: tuple[Pair, ...]
    backend: Backend
    vni: int
    overlay: str
    """The network's id."""
    subnet: str
    roles: Mapping[str, str]
    """Service to role."""
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    """Stands in every packet that is in clear on purpose."""
    markers: Mapping[Pair, str] = field(default_factory=dict)

    def port(self, end: End) -> int | None:
        """Where a task takes SMTP or LMTP; None when it is of no known role."""
        return PORTS.get(self.roles.get(end.service, ""))


@dataclass(frozen=True)
class _Spoken:
    """What the agents said for an ordered pair."""

    arrived: bool | None
    trouble: str = ""
    failed: tuple[str, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict)
    """How a packet was forged, to the token in it."""


def run(fleet: Fleet, keep: Path | None = None) -> list[Verdict]:
    """Verify all pairs of tasks; a host that does not answer, or a service that does not run, is unknown.

    Empty when nothing is deployed.

    Args:
        keep: a folder for the packets that hold a marker in clear: the control, forgeries, and a leak if there is one.

    Raises:
        HostError: a host lacks tcpdump or python3.
    """
    found = _once(fleet, keep)
    if any(cause.name == "capture-dropped" for one in found for cause in one.causes):
        report.progress("verify: once more, since packets were not captured")
        found = _once(fleet, keep)
    return found


def run_patiently(fleet: Fleet) -> list[Verdict]:
    """Verify after a change: services may be starting anew. What was read in clear or forged does not heal."""
    found: list[Verdict] = tenacity.Retrying(
        retry=tenacity.retry_if_result(_may_heal),
        stop=tenacity.stop_after_delay(PATIENCE),
        wait=tenacity.wait_fixed(2),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else [],
    )(run, fleet)
    return found


def _may_heal(found: Sequence[Verdict]) -> bool:
    names = {cause.name for one in found for cause in one.causes}
    return bool(names) and not names & {"clear-text", "clear-vxlan", "forged", "encryption-none"}


@dataclass(frozen=True)
class _Round:
    """One measurement: who takes part, and what was in force on the hosts when its captures began."""

    fleet: Fleet
    hosts: Hosts
    plan: Plan
    begun: Mapping[str, State]

    def addresses(self, host: str) -> frozenset[str]:
        return _addresses(self.fleet, self.hosts, host)


def _once(fleet: Fleet, keep: Path | None) -> list[Verdict]:
    facts = gather_all(fleet, strict=False)
    plan = _plan(fleet, facts)
    silent = [*_silent(facts), *_absent(fleet, facts, plan)]
    if not plan.pairs:
        return silent
    hosts = sorted({end.host for end in plan.ends})
    report.progress(f"verify: {len(plan.pairs)} pairs, capture on {', '.join(hosts)}")
    words = _filter(fleet, facts, plan)
    processes = {host: [end.process for end in plan.ends if end.host == host] for host in hosts}
    begun: dict[str, State] = {}

    def begin(host: Host) -> None:
        begun[host.name] = capture.start(host, words, plan.overlay, processes[host.name])

    now = _Round(fleet, facts, plan, begun)
    try:
        fleet.each(begin, hosts)
        with ThreadPoolExecutor(max_workers=min(8, len(plan.pairs))) as pool:
            spoken = dict(zip(plan.pairs, pool.map(lambda pair: _speak(now, *pair), plan.pairs), strict=True))
    finally:
        captured = fleet.each(lambda host: capture.stop(host, begun[host.name]), list(begun))
    letters: dict[Pair, str] = {}
    for pair in plan.pairs:
        if _is_delivery(plan, *pair) and spoken[pair].arrived:
            try:
                letters[pair] = _letter(now, *pair)
            except SwarmmailError as error:
                failed = (*spoken[pair].failed, f"no large message was sent: {error}")
                spoken[pair] = replace(spoken[pair], failed=failed)
    evidence = [_evidence(now, captured, pair, spoken[pair], letters.get(pair, "")) for pair in plan.pairs]
    if keep is not None:
        _keep(keep, plan, captured)
    return [*(verdict.judge(one) for one in evidence), *silent]


# ---- who ----


def _plan(fleet: Fleet, hosts: Hosts) -> Plan:
    """Who is on the network, by each host's own Docker: of a broken network the managers know old things."""
    inventory = fleet.inventory
    found = fleet.each(lambda host: _on(host, hosts[host.name], inventory), [n for n, f in hosts.items() if f.engine])
    network: Mapping[str, Any] = next((one.network for one in found.values() if one.network), {})
    roles = _roles(inventory)
    ends = [end for one in found.values() for end in one.ends]
    ends.sort(key=lambda end: (roles.get(end.service, "") != "mta", end.service, end.host))
    # what MTA and edge have to say, they say to the MDA
    strangers = {"mta", "edge"}
    pairs = tuple(
        (a, b) for a in ends for b in ends if a is not b and {roles.get(a.service), roles.get(b.service)} != strangers
    )
    options = network.get("Options") or {}
    pools = (network.get("IPAM") or {}).get("Config") or [{}]
    meshed = any(facts.mesh.config for facts in hosts.values())
    return Plan(
        ends=tuple(ends),
        pairs=pairs,
        backend="ipsec" if "encrypted" in options else "wireguard" if meshed else "none",
        vni=int(str(options.get("com.docker.network.driver.overlay.vxlanid_list", "0")).split(",")[0]),
        overlay=str(network.get("Id", "")),
        subnet=pools[0].get("Subnet", ""),
        roles=roles,
        markers={pair: secrets.token_hex(32) for pair in pairs},
    )


@dataclass(frozen=True)
class _Found:
    """What a host's Docker says: its tasks on the network, and the network, if there are any."""

    ends: tuple[End, ...] = ()
    network: Mapping[str, Any] = field(default_factory=dict)


def _on(host: Host, facts: HostFacts, inventory: Inventory) -> _Found:
    name = inventory.network.name
    prefix = f"{inventory.stack.name}_" if inventory.stack is not None else ""
    ends = []
    network: Mapping[str, Any] = {}
    with host.doing("look for tasks on the network"):
        for container in host.docker.containers(filters={"label": SERVICE}):
            raw = host.docker.inspect_container(container["Id"])
            attached = raw["NetworkSettings"]["Networks"].get(name)
            if attached is None or not raw["State"]["Running"]:
                continue
            ends.append(
                End(
                    host=host.name,
                    service=raw["Config"]["Labels"][SERVICE].removeprefix(prefix),
                    address=attached["IPAddress"],
                    mac=attached["MacAddress"].lower(),
                    process=raw["State"]["Pid"],
                    data_path=facts.node_address,
                )
            )
            network = network or host.docker.inspect_network(attached["NetworkID"])
    return _Found(tuple(ends), network)


def _roles(inventory: Inventory) -> dict[str, str]:
    if inventory.stack is None:
        return {}
    return {name: service.role for name, service in stack.read(inventory).services.items()}


def _silent(hosts: Hosts) -> list[Verdict]:
    """Hosts of which nothing can be said."""
    return [
        _unknown(name, "away", f"{name}: {why}")
        for name, facts in hosts.items()
        if (why := facts.unreachable or ("" if facts.engine else "Docker does not answer"))
    ]


def _absent(fleet: Fleet, hosts: Hosts, plan: Plan) -> list[Verdict]:
    """Services that are deployed, and of which no task runs: of them nothing can be said either."""
    stack_name = fleet.inventory.stack.name if fleet.inventory.stack is not None else ""
    missing = sorted(plan.roles.keys() - {end.service for end in plan.ends})
    manager = next((name for name, facts in hosts.items() if facts.is_manager and facts.engine), None)
    if not missing or manager is None:
        return []
    try:
        with fleet[manager].doing("read the services"), at_once():
            seen = fleet[manager].docker.services()
    except HostError as error:
        return [_unknown(manager, "away", str(error))]
    wanted = {raw["Spec"]["Name"] for raw in seen if raw["Spec"]["Mode"].get("Replicated", {}).get("Replicas") != 0}
    return [
        _unknown(name, "not-running", f"no task of {name} runs: nothing can be measured", "see: fab status")
        for name in missing
        if f"{stack_name}_{name}" in wanted
    ]


def _unknown(what: str, cause: str, text: str, mend: str = verdict.MEND) -> Verdict:
    return Verdict(what, verdict.UNKNOWN, (verdict.Cause(cause, verdict.UNKNOWN, text, mend),), ())


def _is_delivery(plan: Plan, sender: End, receiver: End) -> bool:
    return (plan.roles.get(sender.service), plan.roles.get(receiver.service)) == ("mta", "mda")


def _addresses(fleet: Fleet, hosts: Hosts, host: str) -> frozenset[str]:
    """By which the host is seen on the underlay."""
    links = hosts[host].addresses
    own = {
        a for link, all_ in links.items() if link not in (MESH, "lo") and not link.startswith("docker") for a in all_
    }
    return frozenset(own | {fleet.inventory.hosts[host].advertise})


def _filter(fleet: Fleet, facts: Hosts, plan: Plan) -> str:
    """What is captured: all between the hosts, and what belongs to the network wherever it goes; but no SSH."""
    hosts = {address for end in plan.ends for address in _addresses(fleet, facts, end.host)}
    hosts |= {end.data_path for end in plan.ends}
    ssh = sorted({22, *(fleet.inventory.hosts[end.host].port for end in plan.ends)})
    what = [
        f"udp port {DATA_PORT}",
        f"udp port {fleet.inventory.network.tunnel_port}",
        "ip proto 50",
        "ip6 proto 50",
        f"net {plan.subnet}",
        *(f"host {address}" for address in sorted(hosts) if not address.startswith("fe80")),
    ]
    return f"({' or '.join(what)}) and not tcp port {' and not tcp port '.join(map(str, ssh))}"


# ---- what is sent ----


def _speak(now: _Round, sender: End, receiver: End) -> _Spoken:
    marker = now.plan.markers[sender, receiver]
    jobs: list[dict[str, Any]] = []
    port = now.plan.port(receiver)
    if port is not None:
        jobs.append({"do": "speak", "address": receiver.address, "port": port, "marker": marker, "times": TIMES})
    jobs.append({"do": "say", "address": receiver.address, "port": NOBODY_LISTENS, "payload": marker, "times": 3})
    failed: list[str] = []
    in_clear = _control(now, sender, receiver)
    forged, tokens = _forge(now, sender, receiver)
    try:
        answers = capture.ask(now.fleet[sender.host], [*in_clear, *forged])
        failed += [f"{sender.host}: {one['error']}" for one in answers if "error" in one]
        answers = capture.ask(now.fleet[sender.host], jobs, sender.process)
    except HostError as error:
        return _Spoken(None, failed=(str(error),), tokens=tokens)
    said = answers[0] if port is not None else {}
    return _Spoken(
        arrived=said.get("answers", 0) == TIMES,
        trouble=said.get("error", ""),
        failed=tuple(failed),
        tokens=tokens,
    )


def _control(now: _Round, sender: End, receiver: End) -> list[dict[str, Any]]:
    """The marker in clear, by the way that the encrypted packets take."""
    payload = f"{now.plan.nonce} {now.plan.markers[sender, receiver]}"
    if sender.host == receiver.host:
        hosts = now.fleet.inventory.hosts
        others = [name for name in hosts if name != sender.host and not hosts[name].nat]
        if not others:
            return []
        target = hosts[others[0]].advertise
        return [_datagram(target, NOBODY_LISTENS, NOBODY_LISTENS, payload)]
    if now.plan.backend == "wireguard":
        state = now.begun[sender.host]
        target, port = _underlay_of(now.fleet, state, receiver)
        return [_datagram(target, state.port or port, port, payload)]
    return [_datagram(receiver.data_path, NOBODY_LISTENS, NOBODY_LISTENS, payload)]


def _datagram(address: str, source_port: int, port: int, payload: str) -> dict[str, Any]:
    return {"do": "control", "address": address, "from": source_port, "port": port, "payload": payload, "times": 2}


def _underlay_of(fleet: Fleet, state: State, receiver: End) -> tuple[str, int]:
    """Address and port by which a host reaches another's tunnel: as WireGuard has it now, else the inventory's."""
    peer = state.peer_at(receiver.data_path)
    if peer is not None and peer.endpoint is not None:
        return peer.endpoint
    return fleet.inventory.hosts[receiver.host].advertise, fleet.inventory.network.tunnel_port


def _forge(now: _Round, sender: End, receiver: End) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Packets for the receiving task, made beside Docker: as a stranger on the network would.

    A hardware address that the host knows from elsewhere is dropped by VXLAN for that reason alone, so one that
    nobody has is tried as well; likewise the address of a stranger and of a peer.
    """
    if sender.host == receiver.host:
        return [], {}
    here = now.fleet.inventory.hosts[sender.host].advertise
    there, _ = _underlay_of(now.fleet, now.begun[sender.host], receiver)
    if ip_address(there).version != 4 or ip_address(here).version != 4:
        return [], {}
    nobody = "02:" + ":".join(secrets.token_hex(1) for _ in range(5))
    tokens: dict[str, str] = {}
    packets = []
    for source in dict.fromkeys((STRANGER, here, sender.data_path)):
        for target in dict.fromkeys((there, receiver.data_path)):
            for mac, whose in ((nobody, "nobody's"), (sender.mac, "a peer's")):
                how = f"from {source} to {target}, {whose} MAC"
                tokens[how] = f"{now.plan.nonce} {secrets.token_hex(16)}"
                packets.append(
                    {
                        "source": source,
                        "target": target,
                        "vni": now.plan.vni,
                        "inner_source": sender.address,
                        "inner_target": receiver.address,
                        "inner_source_mac": mac,
                        "inner_target_mac": receiver.mac,
                        "token": tokens[how],
                    }
                )
    return [{"do": "forge", "via": there, "port": DATA_PORT, "packets": packets}], tokens


def _letter(now: _Round, sender: End, receiver: End) -> str:
    """A large message by LMTP, over the network: what only fails for large packets fails here."""
    recipient = probe.address(now.fleet.inventory)
    if recipient is None:
        return ""
    seen = services.observe(now.fleet, bootstrap.look_again(now.fleet, Observed(now.hosts)))
    with Accounts(now.fleet, seen).temporary(recipient, tell=False):
        job = {
            "do": "letter",
            "address": receiver.address,
            "port": PORTS["mda"],
            "recipient": recipient,
            "marker": secrets.token_hex(16),
            "bytes": LETTER,
        }
        answer = capture.ask(now.fleet[sender.host], [job], sender.process)[0]
    return f"{answer['status']}{' at ' + answer['at'] if 'at' in answer else ''}"


# ---- what was seen ----


def _evidence(now: _Round, captured: Mapping[str, Captured], pair: Pair, spoken: _Spoken, letter: str) -> Evidence:
    sender, receiver = pair
    marker = now.plan.markers[pair].encode()
    there = captured[receiver.host]
    inside = there.inside.get(receiver.process, b"")
    arrived = spoken.arrived
    if arrived is not None and now.plan.port(receiver) is None:  # no server: only the capture can tell
        arrived = marker in inside if now.begun[receiver.host].ready == "yes" else None
    tunnels = [facts.mtus[MESH] for facts in now.hosts.values() if MESH in facts.mtus]
    return Evidence(
        sender=sender,
        receiver=receiver,
        backend=now.plan.backend,
        vni=now.plan.vni,
        arrived=arrived,
        datagrams=marker in inside,
        trouble=spoken.trouble,
        at_sender=_look(now, captured[sender.host], marker, sender, receiver),
        at_receiver=_look(now, there, marker, receiver, sender),
        states=now.begun,
        dropped=captured[sender.host].dropped + there.dropped,
        forgeries=tuple(
            Forgery(how, reached=token.encode() in there.underlay, delivered=token.encode() in inside)
            for how, token in spoken.tokens.items()
        ),
        failed=spoken.failed,
        alone=len(now.fleet.inventory.hosts) == 1,
        mtu=min(tunnels) - OVERHEAD if now.plan.backend == "wireguard" and tunnels else 0,
        letter=letter,
    )


def _look(now: _Round, captured: Captured, marker: bytes, here: End, there: End) -> judge.Seen | None:
    """The judge's reading of what one host captured; None when it captured nothing."""
    state = now.begun[here.host]
    if state.ready != "yes":
        return None
    peer = state.peer_at(there.data_path)
    address, port = peer.endpoint if peer is not None and peer.endpoint is not None else (None, 0)
    ports = {state.port, now.begun[there.host].port, port}
    question = Question(
        here=now.addresses(here.host),
        there=now.addresses(there.host) | ({address} if address else set()),
        vni=now.plan.vni,
        data_port=DATA_PORT,
        tunnel_ports=frozenset(ports - {0}) if now.plan.backend == "wireguard" else frozenset(),
        marker=marker,
        control=now.plan.nonce.encode(),
        ignore=state.ignore,
    )
    try:
        return judge.judge(captured.underlay, question)
    except judge.NotACapture:
        return None


def _keep(folder: Path, plan: Plan, captured: Mapping[str, Captured]) -> None:
    """Save what was judged, and nothing else: mail that passed meanwhile stays unsaved."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    needles = [plan.nonce.encode(), *(marker.encode() for marker in plan.markers.values())]
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for host, one in captured.items():
        file = folder / f"verify-{stamp}-{host}.pcap"
        file.touch(mode=0o600)
        file.write_bytes(judge.only(one.underlay, needles))
        report.progress(f"kept {file}", host)


# ---- what is shown ----


def all_proven(found: Sequence[Verdict]) -> bool:
    """Whether there was something to prove, and it is proven."""
    return bool(found) and all(one.outcome == verdict.PROVEN for one in found)


def show(found: Sequence[Verdict]) -> None:
    """A table of the pairs; below it why, and what was counted."""
    if not found:
        report.result("verify: nothing to prove: no two tasks are on the mail network (run: fab deploy)")
        return
    report.table("", ("pair", "verdict", "why"), [(one.pair, one.outcome, _why(one)) for one in found])
    for one in found:
        report.result(f"\n{one.pair}")
        for cause in one.causes[1:]:
            report.result(f"  also: {cause.text} -> {cause.mend}")
        for line in one.evidence:
            report.result(f"  {line}")
    if all_proven(found):
        report.result(f"verify: proven for {len(found)} pairs", good=True)
    else:
        bad = sum(one.outcome != verdict.PROVEN for one in found)
        report.result(f"verify: NOT proven for {bad} of {len(found)} pairs", good=False)


def lines(found: Sequence[Verdict]) -> None:
    """One line a pair."""
    for one in found:
        report.result(f"verify: {one.pair}: {one.outcome}: {_why(one)}", good=one.outcome == verdict.PROVEN)


def _why(one: Verdict) -> str:
    return one.text if one.causes else "the marker arrived, nothing of it could be read, nothing forged was taken"


def document(found: Sequence[Verdict]) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "proven": all_proven(found),
        "pairs": [
            {
                "pair": one.pair,
                "verdict": one.outcome,
                "causes": [asdict(cause) for cause in one.causes],
                "evidence": list(one.evidence),
            }
            for one in found
        ],
    }


def watch(fleet: Fleet, interval: float, keep: Path | None = None) -> None:
    """Verify again and again, every ``interval`` seconds, a line a pair each time. Ends only when interrupted."""
    while True:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            found = run(fleet, keep)
            words = [f"{one.pair} {one.outcome}" + (f" ({one.text})" if one.causes else "") for one in found]
            report.result(f"{stamp}  {'; '.join(words) or 'nothing to prove'}", good=all_proven(found))
        except SwarmmailError as error:
            report.result(f"{stamp}  unknown: {error}", good=False)
            for host in fleet:
                host.close()
        time.sleep(interval)
