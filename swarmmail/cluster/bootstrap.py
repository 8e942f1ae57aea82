"""Bootstrap: observe, plan, show, apply, observe again. What to do is decided in ``model/bootstrap.py``."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import tenacity

from swarmmail import report
from swarmmail.cluster import check, install, lock, mesh, overlay, swarm
from swarmmail.hosts.connection import Host
from swarmmail.hosts.dockerapi import ELECTION, at_once, say_it_once
from swarmmail.hosts.facts import gather_all
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import bootstrap as model
from swarmmail.model.bootstrap import Design, Observed
from swarmmail.model.errors import HostError, Refused, SwarmmailError
from swarmmail.model.facts import HostFacts
from swarmmail.model.findings import Level
from swarmmail.model.inventory import Inventory
from swarmmail.model.patience import patient
from swarmmail.model.plan import Action, Plan, Step
from swarmmail.model.swarm import Swarm

_ALARM = "CLEAR TEXT"
ROUNDS = 4
"""Plans carried out in one run: the last one must find nothing to do."""
SETTLE = patient(75)  # seconds that nodes may take to become Ready: after a change of leader each has to report anew
ELECTIONS = 3
"""So often that wait is made anew when there is a new leader: a manager that was cut off brings an election about when
it is back, and half a minute may pass until somebody leads."""
QUIET = 5
"""Seconds in which what heals by itself mostly has: only then it is said, and everything is looked at anew."""
_IN_DOCKER = frozenset(set(Action) - {Action.INSTALL, Action.MESH, Action.START, Action.LEAVE})
"""What changes nothing on a host but what its Docker says of the Swarm."""


class NoManager(Refused):
    """There are managers, and none answers for the Swarm: too few run, or they are about to elect a leader."""


class Electing(NoManager):
    """Enough of them run: an election takes 10 to 20 s, and as much again when two of them wanted it at once."""


def observe(fleet: Fleet, strict: bool = True) -> Observed:
    """Facts of all hosts (``strict``: all must answer), and the Swarm as its first reachable manager sees it.

    Raises:
        NoManager: unless (``strict``) bootstrap can mend what a host lacks: that may be what the managers wait for.
    """
    fleet[model.managers(fleet.inventory)[0]].open_docker()  # most likely the one that is asked below
    facts = gather_all(fleet, strict)
    try:
        return Observed(facts, look_at_swarm(fleet, facts))
    except NoManager:
        if not strict or not model.hindered(facts):
            raise
    return Observed(facts)


_observe_patiently = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(NoManager),
    stop=tenacity.stop_after_delay(ELECTION),
    wait=tenacity.wait_fixed(0.5),
    reraise=True,
)


def after_the_election(look: Callable[[], Observed], seconds: float = ELECTION) -> Observed:
    """What ``look`` sees, tried for so many seconds while the managers are about to elect a leader.

    Raises:
        NoManager: as ``look`` does.
    """
    return _observe_patiently.copy(
        retry=tenacity.retry_if_exception_type(Electing),
        stop=tenacity.stop_after_delay(seconds),
        before_sleep=say_it_once(seconds),
    )(look)


def _refresh(fleet: Fleet, before: Observed) -> Observed:
    """Only what Docker says, anew: of every host its own part, and the Swarm. For steps that change nothing else.

    Raises:
        SwarmmailError: not to be seen so; then ``observe``.
    """
    seen = fleet.each(swarm.membership)
    facts = {name: replace(before.hosts[name], **seen[name]) for name in before.hosts}
    return Observed(facts, look_at_swarm(fleet, facts))


def look_again(fleet: Fleet, before: Observed) -> Observed:
    """The Swarm anew, as a manager sees it; the hosts' own facts as they were. An election is waited for."""
    return after_the_election(lambda: Observed(before.hosts, look_at_swarm(fleet, before.hosts)))


def look_at_swarm(fleet: Fleet, facts: Mapping[str, HostFacts]) -> Swarm | None:
    """The Swarm as its first manager that answers sees it; None when no host says that it is one.

    Raises:
        NoManager: there are managers, and none answers.
    """
    candidates = [n for n in fleet.inventory.hosts if facts[n].swarm == "active" and facts[n].is_manager]
    chosen = model.managers(fleet.inventory)
    candidates.sort(key=lambda name: name not in chosen)  # one that is to be demoted could not see that end
    failure: SwarmmailError | None = None
    hindered = model.hindered(facts)
    electing = not hindered and model.will_elect(candidates, facts)
    if hindered and candidates and not any(facts[name].cluster for name in candidates):
        # their Docker has just been asked, and found no leader in 20 s: they miss the others
        failure = HostError(facts[candidates[0]].swarm_error or "no leader", host=candidates[0])
        candidates = []
    for name in candidates:
        try:
            with at_once():
                return swarm.view(fleet[name])
        except HostError as error:
            failure = error
    if failure is not None:
        raise (Electing if electing else NoManager)(
            f"no manager answers for the Swarm ({failure.what})",
            host=failure.host,
            step="read the Swarm",
            hint="; ".join(f"{name}: {why}" for name, why in hindered.items()) + "; run: fab bootstrap"
            if hindered
            else "enough of them run and will elect a leader: try again in a minute; is TCP 2377 open between them?"
            if electing
            else "without a majority of managers nothing can be changed: bring the missing ones back",
        )
    return None


def decide(inventory: Inventory, observed: Observed) -> tuple[Design, Plan]:
    """The design and the plan. Raises Refused."""
    design = model.design(inventory, observed, {})
    if design.mesh is not None:
        design = model.design(inventory, observed, mesh.digests(design.mesh))
    return design, model.plan(design)


def shout(plan: Plan) -> None:
    """What has to be said at every run, also when there is nothing to do."""
    for note in plan.notes:
        if _ALARM in note:
            report.warning(note)


def show(plan: Plan) -> None:
    shout(plan)
    for note in plan.notes:
        if _ALARM not in note:
            report.progress(note)
    for wait in plan.waits:
        report.warning(wait)
    if plan.steps:
        report.table("plan", ["", "host", "step"], [("+", s.host, s.text) for s in plan.steps])


def run(fleet: Fleet, preflight: bool = True) -> bool:
    """Bring the hosts to the wanted state; False when there was nothing to do.

    What can't be seen before something else is done or has woken up makes a further round. ``preflight``: before a
    host becomes a member, look at all hosts and between them.

    Raises:
        Refused: the preflight found an error; nothing was changed.
        SwarmmailError: any step failed, or the end state is not what the inventory wants.
    """
    inventory, changed = fleet.inventory, False
    called: set[tuple[str, str]] = set()  # by which hosts from another port, and whom
    hint = "run it again; it goes on from here"
    observed = after_the_election(lambda: observe(fleet))
    for _ in range(ROUNDS):
        design, plan = decide(inventory, observed)
        if plan.is_empty and not plan.is_done:
            observed, design, plan = _wait(fleet, (observed, design, plan))
        if plan.is_done:
            if not changed:
                shout(plan)
            return changed
        if plan.is_empty:
            break
        calls = {(step.host, step.argument) for step in plan.of(Action.MESH) if step.argument}
        if len(calls & called) == len(plan.steps):
            port = inventory.network.tunnel_port
            hint = f"another port did not help; is UDP {port} of the other host open? see: fab check"
            break
        called |= calls
        with _locked(fleet, design):
            show(plan)
            if preflight and (plan.of(Action.INIT) or plan.of(Action.JOIN)):
                _preflight(fleet, observed)
                preflight = False
            apply(fleet, design, plan)
        changed = True
        report.progress("check: is it as wanted, and do all nodes hear each other?")
        observed = _after(fleet, observed, plan)
    left = [f"{step.host}: {step.text}" for step in plan.steps] + list(plan.waits)
    raise SwarmmailError(f"not all is as wanted after bootstrap: {'; '.join(left)}", hint=hint)


def _preflight(fleet: Fleet, observed: Observed) -> None:
    found = check.run(fleet, observed=observed)
    for one in found:
        if one.level is Level.WARNING:
            report.warning(f"{one.where}, {one.what}: {one.measured} -> see: fab check")
    errors = [f"{f.where}, {f.what}: {f.measured} -> {f.mend}" for f in found if f.level is Level.ERROR]
    if errors:
        raise Refused("\n".join(errors), hint="nothing was changed; see: fab check (--no-check goes on all the same)")


def _after(fleet: Fleet, before: Observed, done: Plan) -> Observed:
    """What is there after the steps of a plan: what they can have changed is read anew, and everything as soon as
    something is left to do."""
    if {step.action for step in done.steps} <= _IN_DOCKER:
        with contextlib.suppress(SwarmmailError):
            seen = _refresh(fleet, before)
            if decide(fleet.inventory, seen)[1].is_empty:
                return seen
    return _observe_patiently(lambda: observe(fleet))


_Found = tuple[Observed, Design, Plan]


def _wait(fleet: Fleet, before: _Found) -> _Found:
    """Wait for what heals by itself: until all is done, or something is to be done, or it takes too long. Right after
    ``before`` a short look is enough; later, and before anything is done, it is a whole one."""

    def short() -> _Found:
        seen = _refresh(fleet, before[0])
        return seen, *decide(fleet.inventory, seen)

    def whole() -> _Found:
        seen = _observe_patiently(lambda: observe(fleet))
        return seen, *decide(fleet.inventory, seen)

    def over(found: _Found) -> bool:
        return found[2].is_done or not found[2].is_empty

    found = before
    with contextlib.suppress(SwarmmailError):  # what it was, the whole look says
        found = swarm.wait_until(short, over, QUIET, pause=0.1)
    if found[2].is_done:
        return found
    if found[2].is_empty:
        for wait in found[2].waits:
            report.warning(f"{wait}; waiting for up to {SETTLE:g} s")
    for _ in range(ELECTIONS):
        found = swarm.wait_until(whole, over, SETTLE)
        if over(found) or not found[0].has_new_leader:
            break
    return found


@contextlib.contextmanager
def _locked(fleet: Fleet, design: Design) -> Iterator[None]:
    """The folder on the lead keeps two first runs apart; the Swarm's lock keeps other tasks away. A leader that is left
    alone answers for some 10 s more, and can write nothing: then nobody can, and the folder is enough."""
    there = design.observed.swarm
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.held(fleet[fleet.inventory.lead.name], "bootstrap", swarm=False))
        if there is not None and model.has_majority(there, design.observed.hosts):
            stack.enter_context(lock.held(fleet[there.manager], "bootstrap", swarm=True))
        yield


Joined = dict[str, str]
"""Host to node id, of those that joined in this run."""

_LAST = ((Action.PROMOTE, Action.FORGET, Action.DEMOTE), (Action.LABEL,), (Action.NETWORK,))
"""Chains that do not touch each other: done at once when all hosts have joined."""


def apply(fleet: Fleet, design: Design, plan: Plan) -> None:
    """Do the steps, phase by phase; within a phase all hosts at once, but roles one after the other."""
    joined: Joined = {}

    def do(action: Action) -> None:
        if steps := plan.of(action):
            report.progress(f"{action}: {', '.join(dict.fromkeys(step.host for step in steps))}")
            _PHASES[action](fleet, design, steps, joined)

    def chain(actions: tuple[Action, ...]) -> None:
        for action in actions:
            do(action)

    chain(tuple(action for action in Action if not any(action in last for last in _LAST)))
    with ThreadPoolExecutor(max_workers=len(_LAST)) as pool:
        for future in [pool.submit(chain, actions) for actions in _LAST]:
            future.result()


def _manager(fleet: Fleet, design: Design) -> str:
    there = design.observed.swarm
    return there.manager if there is not None else model.managers(fleet.inventory)[0]


def _install(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    wanted = {step.host: step.argument for step in steps}
    fleet.each(lambda host: install.install(host, wanted[host.name]), wanted)


def _start(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    fleet.each(install.start_docker, [step.host for step in steps])


def _mesh(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    mesh.build(fleet, design, {step.host: step.argument for step in steps})


def _leave(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    fleet.each(swarm.leave, [step.host for step in steps])


def _listen(design: Design, host: str) -> str:
    """Listen on the address that is advertised; on all when that is not the host's own (one-to-one NAT)."""
    address = design.swarm_address(host)
    if design.mesh is not None or design.observed.hosts[host].link_of(address):
        return address
    return "0.0.0.0"  # noqa: S104


def _init(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    for host in fleet:
        host.open_docker()  # their turn comes next
    for step in steps:
        address = design.swarm_address(step.host)
        swarm.init(
            fleet[step.host],
            fleet.inventory.cluster,
            address,
            _listen(design, step.host),
            str(design.block.pool),
        )


def _join(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    manager = _manager(fleet, design)
    token = swarm.worker_token(fleet[manager])
    there = design.swarm_address(manager)
    joined |= fleet.each(
        lambda host: swarm.join(host, token, design.swarm_address(host.name), _listen(design, host.name), there),
        [step.host for step in steps],
    )


def _node_ids(fleet: Fleet, names: list[str], joined: Joined) -> dict[str, str]:
    """Node ids as the hosts themselves know them: a host name may occur twice in the Swarm's list (F30)."""

    def ask(host: Host) -> str:
        with host.doing("read the node id"):
            return str(host.docker.info()["Swarm"]["NodeID"])

    unknown = [name for name in names if name not in joined]
    known = {**joined, **(fleet.each(ask, unknown) if unknown else {})}
    return {name: known[name] for name in names}


def _promote(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined, role: str = "manager") -> None:
    manager = fleet[_manager(fleet, design)]
    for host, node in _node_ids(fleet, [step.host for step in steps], joined).items():
        report.progress(f"{role}", host)
        swarm.set_role(manager, node, role)


def _demote(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    _promote(fleet, design, steps, joined, role="worker")


def _forget(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    """Remove old nodes of hosts that joined anew. The new node takes over what the old one's labels say of
    data on that host, and the markers there, which name the old node, are told the new id."""
    manager = fleet[_manager(fleet, design)]
    assert design.observed.swarm is not None
    ids = _node_ids(fleet, list(dict.fromkeys(step.host for step in steps)), joined)
    for step in steps:
        old, new = design.observed.swarm.nodes[step.argument], ids[step.host]
        if old.id == new:
            continue
        for service in sorted(old.places):
            swarm.set_label(manager, new, f"swarmmail.{service}", "true")
        _rehome(fleet, design, step.host, old.id, new)
        swarm.forget(manager, old.id)


def _rehome(fleet: Fleet, design: Design, host: str, old: str, new: str) -> None:
    if not any(marker.node == old for marker in design.observed.hosts[host].markers):
        return
    with fleet[host].doing("read Docker's folder"):
        root = fleet[host].docker.info()["DockerRootDir"]
    script = f"cd {shlex.quote(root)}/volumes || exit 1\n{_REHOME}"
    fleet[host].run(f"set -- {old} {new}\n{script}", step="tell the volumes their node's new id")


# What is in a volume is a container's to write: no link is followed, and the new file is made outside of the volume.
_REHOME = """
for f in */_data/.swarmmail-volume; do
  [ -f "$f" ] && [ ! -L "$f" ] || continue
  text=$(dd if="$f" iflag=nofollow,nonblock bs=4096 count=1 status=none | grep -aE '^[a-z]+=') || continue
  case $text in *"node=$1"*) ;; *) continue ;; esac
  made=$(mktemp "${f%%/*}/.swarmmail.XXXXXX") || exit 1
  { printf '%s\\n' "$text" | sed "s/^node=$1\\$/node=$2/" >"$made" && chmod 644 "$made" &&
    sync "$made" && mv -fT "$made" "$f" && sync "${f%%/*}/_data"; } ||
    { rm -f "$made"; exit 1; }
done
"""


def _label(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    manager = fleet[_manager(fleet, design)]
    ids = _node_ids(fleet, [step.host for step in steps], joined)
    fleet.each(lambda host: swarm.label_host(manager, ids[host.name], host.name), ids)


def _network(fleet: Fleet, design: Design, steps: tuple[Step, ...], joined: Joined) -> None:
    overlay.create(fleet[_manager(fleet, design)], design)


_PHASES = {
    Action.INSTALL: _install,
    Action.START: _start,
    Action.MESH: _mesh,
    Action.LEAVE: _leave,
    Action.INIT: _init,
    Action.JOIN: _join,
    Action.PROMOTE: _promote,
    Action.DEMOTE: _demote,
    Action.FORGET: _forget,
    Action.LABEL: _label,
    Action.NETWORK: _network,
}


def _lock_places(fleet: Fleet) -> dict[str, tuple[Host, bool]]:
    lead = fleet[fleet.inventory.lead.name]
    places = {f"folder on {lead.name}": (lead, False)}
    manager = after_the_election(lambda: observe(fleet)).swarm
    if manager is not None:
        places["Swarm"] = (fleet[manager.manager], True)
    return places


def locks(fleet: Fleet) -> dict[str, lock.Owner | None]:
    """Who holds the locks: the one for first runs, and the Swarm's."""
    return {place: lock.read(host, in_swarm) for place, (host, in_swarm) in _lock_places(fleet).items()}


def break_locks(fleet: Fleet) -> None:
    """Release both, whoever holds them."""
    for host, in_swarm in _lock_places(fleet).values():
        lock.release(host, in_swarm, None)
