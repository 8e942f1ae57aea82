"""`fab migrate` and its companions: check, run, recover, purge."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from swarmmail import report
from swarmmail.cluster import bootstrap, lock, swarm
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail import hooks, services
from swarmmail.mail.services import Seen
from swarmmail.model import move as model
from swarmmail.model import stack as stacks
from swarmmail.model.errors import InputError, Refused, SwarmmailError
from swarmmail.model.move import Measured, Move
from swarmmail.model.placement import LIVE, markers_of, place
from swarmmail.model.stack import Service, StackFile, first_host
from swarmmail.move import acts, journal
from swarmmail.move.acts import HostActs
from swarmmail.move.bound import BoundActs

RATE = 100e6
"""Bytes per second of a first copy, where nothing is known: one gigabit."""


@dataclass(frozen=True)
class Options:
    source_is_dead: bool = False
    yes: bool = False
    bwlimit: str = "0"
    """As rsync's: KiB/s, or with a unit; 0 is none."""


@dataclass(frozen=True)
class Found:
    """What the check saw."""

    move: Move
    need: Measured = field(default_factory=Measured)
    there: Measured = field(default_factory=Measured)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    steps: tuple[model.Step, ...] = ()
    seconds: float = 0
    gap: float = 0


@dataclass
class Times:
    """Seconds of each step, in order."""

    steps: list[tuple[str, float]] = field(default_factory=list)

    def watch(self, name: str, seconds: float) -> None:
        self.steps.append((name, seconds))
        report.progress(f"{name}: {seconds:.2f} s")


@dataclass(frozen=True)
class Done:
    """What a move ended with."""

    move: Move
    times: Times
    gap: float | None
    lines: tuple[str, ...] = ()
    failure: SwarmmailError | None = None
    """What has to be done by hand: the service is on the target all the same."""


def _service(fleet: Fleet, stack: StackFile, name: str) -> Service:
    """A service that can be moved, by its name or role. Raises InputError."""
    service = stack.services.get(name) or stack.by_role(name)
    if service is None or not first_host(service, fleet.inventory):
        bound = ", ".join(s.name for s in stack.services.values() if first_host(s, fleet.inventory))
        raise InputError(
            [
                f"--service: found '{name}', allowed: a service that is bound to a host ({bound}); others are bound by "
                f"stack.placement in {fleet.inventory.path}"
            ]
        )
    return service


def check(fleet: Fleet, seen: Seen, name: str, to: str) -> Found:
    """Look whether the move can be made; changes nothing. ``problems``: each one forbids it."""
    inventory = fleet.inventory
    stack = stacks.read(inventory)
    service = _service(fleet, stack, name)
    if to not in inventory.hosts:
        raise InputError([f"--to: found '{to}', allowed: {', '.join(inventory.hosts)}"])
    facts = seen.observed.hosts
    where = place(inventory.cluster, stack, service, first_host(service, inventory), facts, seen.swarm)
    if where.new or service.name not in seen.services or (where.label and not service.volumes):
        raise Refused(f"{service.name} is not deployed yet", step="check", hint="run: fab deploy")
    source = where.host
    needed = {source, to} if service.volumes else {to}  # without data there is nothing to fetch
    problems = [line for host in inventory.hosts if host in needed for line in _unfit(seen, host, to, service)]
    _refuse(problems)
    source_node, target_node = seen.swarm.node_of(source), seen.swarm.node_of(to)
    assert source_node is not None and target_node is not None
    move = Move(
        id=secrets.token_hex(8),
        service=service.name,
        role=service.role,
        source=source,
        target=to,
        source_node=source_node.id,
        target_node=target_node.id,
        volumes=tuple(stack.volume_name(volume) for volume in service.volumes),
        generation=where.generation + 1,
        started=time.time(),
    )
    if source == to:
        return Found(move)
    if facts[source].machine and facts[source].machine != facts[to].machine:
        problems.append(f"{to} is a {facts[to].machine}, {source} a {facts[source].machine}: the image would not run")
    taken = sorted(set(service.ports) & facts[to].listening)
    if taken:
        problems.append(f"{to}: port {', '.join(map(str, taken))} is taken by another program")
    made = _acts(fleet, move, seen, Options())
    found = Found(move, notes=tuple(made.hooks.before(fleet[to])), problems=tuple(problems), steps=made.steps)
    return _with_data(found, fleet, stack, seen, made.hooks.live_copy) if service.volumes else found


def _unfit(seen: Seen, host: str, to: str, service: Service) -> list[str]:
    """What keeps a host from taking part in a move to ``to``."""
    facts, node = seen.observed.hosts[host], seen.swarm.node_of(host)
    if facts.unreachable:
        return [f"{host} does not answer: {facts.unreachable}"]
    problems = []
    if node is None:
        problems.append(f"{host} is not in the Swarm -> run: fab bootstrap")
    elif node.state != "ready" or (host == to and node.availability != "active"):
        problems.append(f"{host} is {node.state} and {node.availability} in the Swarm, it must be ready and active")
    if service.volumes and "rsync" not in facts.programs:
        problems.append(f"{host} has no rsync -> on it: apt-get install rsync")
    return problems


def _with_data(found: Found, fleet: Fleet, stack: StackFile, seen: Seen, live_copy: bool) -> Found:
    """What has to be looked at besides when volumes are moved, too."""
    move, cluster = found.move, fleet.inventory.cluster
    facts, service = seen.observed.hosts[move.target], stack.services[move.service]
    problems, notes = [], []
    foreign = [
        m.volume
        for m in facts.markers
        if m.volume in move.volumes and (m.cluster, m.service) != (cluster, move.service)
    ]
    if foreign:
        problems.append(f"{move.target}: volume {', '.join(foreign)} belongs to another service or cluster")
    measured = fleet.each(lambda host: acts.measure(host, move.volumes), (move.source, move.target))
    need, there = measured[move.source], measured[move.target]
    problems += model.room(need, there, move.target)
    if not any(task["Status"]["State"] == "running" for task in seen.tasks[move.service]):
        notes.append(f"{move.service} does not run on {move.source}; its data is moved as it is")
    if markers_of(cluster, stack, service, facts):
        notes.append(f"{move.target} has an older copy: only what differs is sent")
    seconds, gap = model.estimate(need, there, RATE, live_copy)
    return replace(
        found,
        need=need,
        there=there,
        notes=(*notes, *found.notes),
        problems=(*found.problems, *problems),
        seconds=seconds,
        gap=gap,
    )


def show(found: Found) -> None:
    what = (
        f"{found.need.bytes / 1e6:.1f} MB in {found.need.files} files; "
        f"about {found.seconds:.0f} s, of which it is away {found.gap:.1f} s"
        if found.move.volumes
        else f"it has no data, and answers on {found.move.target} before it ends on {found.move.source}"
    )
    report.result(f"move {found.move.text}: {what}")
    for note in found.notes:
        report.result(f"  {note}")
    for step in found.steps:
        undo = (
            " (no way back from here but a move)" if step.undo is None else f" (undo: {step.undo})" if step.undo else ""
        )
        report.result(f"+ {step.name}: {step.text}{undo}")


def refuse(found: Found) -> None:
    """Raises Refused when the check found what forbids the move."""
    _refuse(found.problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise Refused("; ".join(problems), step="check", hint="mend it, then run the same command again")


def migrate(fleet: Fleet, name: str, to: str, options: Options | None = None) -> Done | None:
    """Move a service; None when it is there already. A move that was interrupted is finished or undone first.

    Raises:
        Refused: the check found what forbids it, or another move is not over.
        SwarmmailError: it failed; the text says where the service is now.
    """
    options = options or Options()
    service = _service(fleet, stacks.read(fleet.inventory), name)
    seen = services.observe(fleet)
    with lock.held(seen.manager, f"migrate --service {name} --to {to}", swarm=True):
        left = journal.read(seen.manager)
        if left is not None and options.source_is_dead and left.move.service == service.name and _lost(seen, left):
            _give_up(fleet, seen, left, options)
            seen = services.observe(fleet)
        elif left is not None:
            if (left.move.service, left.move.target) != (service.name, to):
                raise Refused(
                    f"a move of {left.move.text} was interrupted in phase '{left.phase}'",
                    step="migrate",
                    hint="first: fab migrate.resume, or: fab migrate.abort",
                )
            report.progress(f"an earlier run was interrupted in phase '{left.phase}'")
            done = _recover(fleet, seen, left, options)
            if done is not None:
                return done
            seen = services.observe(fleet)
        if options.source_is_dead and service.volumes:
            return _without_source(fleet, seen, name, to, options)
        found = check(fleet, seen, name, to)
        if found.move.source == found.move.target:
            return None
        refuse(found)
        for note in found.notes:
            report.progress(note)
        return _forward(fleet, seen, found, options)


def _lost(seen: Seen, left: journal.Journal) -> bool:
    """Whether the host that a move's service is on by its journal neither answers nor is a part of the Swarm."""
    host = left.place
    node = seen.swarm.node_of(host)
    return bool(seen.observed.hosts[host].unreachable) and (node is None or node.state != "ready")


def _give_up(fleet: Fleet, seen: Seen, left: journal.Journal, options: Options) -> None:
    """A move whose service is on a host that is lost can neither be finished nor undone. Afterwards it is as if it had
    come to its end there, or had not begun.

    Raises:
        Refused: the operator has not said yes to what it costs.
    """
    move, lost = left.move, left.place
    if not options.yes:
        cost = (
            f"what {move.service} took there is lost"
            if left.phase.is_forward_only
            else f"what {move.target} has of it may not be whole"
            if left.phase is model.Phase.COPY
            else f"what {move.service} took in its last seconds there is lost"
        )
        raise Refused(
            f"the move of {move.text} was interrupted in phase '{left.phase}', and {lost} does not answer: {cost}, "
            f"unless {lost} can be brought back",
            step="check",
            hint="if it is lost for certain, the same with --yes; else, when it is back: fab migrate.resume",
        )
    _acts(fleet, move, seen, options).give_up(fleet[lost])
    left.remove()
    report.progress(f"the move of {move.text} is given up: {lost} is lost")


def _without_source(fleet: Fleet, seen: Seen, name: str, to: str, options: Options) -> Done:
    """An older copy on the target becomes the live one, because the source is lost.

    Raises:
        Refused: the source is not lost, the target has no copy, or the operator has not said yes to what it costs.
    """
    stack = stacks.read(fleet.inventory)
    service = _service(fleet, stack, name)
    if to not in fleet.inventory.hosts:
        raise InputError([f"--to: found '{to}', allowed: {', '.join(fleet.inventory.hosts)}"])
    labelled = [node for node in seen.swarm.nodes.values() if service.name in node.places]
    if len(labelled) != 1 or labelled[0].host == to:
        raise Refused(f"{service.name} is on {to}, or nowhere: no source is lost", step="check", hint="see: fab status")
    source, target = labelled[0], seen.swarm.node_of(to)
    facts = seen.observed.hosts
    answers = source.host in facts and not facts[source.host].unreachable
    if answers or source.state == "ready":
        where = "answers by SSH" if answers else "is ready in the Swarm"
        raise Refused(
            f"{source.host} {where}: it is not dead, and its data is newer",
            step="check",
            hint=f"without --source-is-dead: fab migrate --service {name} --to {to}",
        )
    if target is None or facts[to].unreachable:
        raise Refused(f"{to} does not answer, or is not in the Swarm", step="check", hint="see: fab status")
    copies = markers_of(fleet.inventory.cluster, stack, service, facts[to])
    if len(copies) < len(service.volumes):
        raise Refused(
            f"{to} has no copy of the data of {service.name}",
            step="check",
            hint=f"bring {source.host} back, or take a host that has one (fab status), or restore a backup",
        )
    generation = max(m.generation for m in copies.values())
    path = acts.folder(fleet[to], stack.volume_name(next(iter(service.volumes))))
    age = fleet[to].run(f"date -u -r {path}/.swarmmail-volume '+%F %H:%M UTC'", step="look at the copy").stdout.strip()
    if not options.yes:
        raise Refused(
            f"the copy on {to} is of {age} (generation {generation}): what {service.name} took after that is lost, "
            f"unless {source.host} can be brought back",
            step="check",
            hint="if it is lost for certain, the same with --yes",
        )
    move = Move(
        id=secrets.token_hex(8),
        service=service.name,
        role=service.role,
        source=source.host,
        target=to,
        source_node=source.id,
        target_node=target.id,
        volumes=tuple(stack.volume_name(volume) for volume in service.volumes),
        # the source's own was one more than that of the copy; a copy that was not finished has the number of that move
        generation=generation + 2,
        started=time.time(),
        source_is_dead=True,
    )
    made = _acts(fleet, move, seen, options)
    times = Times()
    opened = journal.begin(seen.manager, move, model.Phase.CUTOVER)  # in one: before it there would be a way back
    model.Run(move, made, opened, times.watch).finish()
    made.lines.append(f"{source.host} may come back: its copy is refused, and can be removed by migrate.purge")
    return _done(made, times)


def _acts(fleet: Fleet, move: Move, seen: Seen, options: Options, files: int = 0) -> HostActs:
    stack = stacks.read(fleet.inventory)
    hook = hooks.of(fleet, stack, move.role)
    kind = HostActs if move.volumes else BoundActs
    return kind(fleet, stack, move, seen.manager, hook, bwlimit=options.bwlimit, files=files)


def _done(made: HostActs, times: Times) -> Done:
    return Done(made.move, times, made.gap, tuple(made.lines), made.failure)


def _forward(fleet: Fleet, seen: Seen, found: Found, options: Options) -> Done:
    made = _acts(fleet, found.move, seen, options, found.need.files)
    times = Times()
    model.Run(found.move, made, journal.begin(seen.manager, found.move), times.watch).forward()
    return _done(made, times)


def _recover(fleet: Fleet, seen: Seen, left: journal.Journal, options: Options) -> Done | None:
    made = _acts(fleet, left.move, seen, options)
    times = Times()
    if model.Run(left.move, made, left, times.watch).recover():
        return _done(made, times)
    report.progress(f"undone: {left.move.service} serves on {left.move.source}")
    return None


def resume(fleet: Fleet, options: Options | None = None) -> Done | None:
    """Go on with a move that was interrupted: finish it, or begin it again. None when there is none."""
    seen = services.observe(fleet)
    with lock.held(seen.manager, "migrate.resume", swarm=True):  # takes over the lock of a run that is dead
        left = journal.read(seen.manager)
    if left is None:
        return None
    return migrate(fleet, left.move.service, left.move.target, options)


def abort(fleet: Fleet) -> Move | None:
    """Undo a move that was interrupted; None when there is none. Raises Refused when it went too far for that."""
    seen = services.observe(fleet)
    with lock.held(seen.manager, "migrate.abort", swarm=True):
        left = journal.read(seen.manager)
        if left is None:
            _sweep(fleet, seen)
            return None
        if left.phase.is_forward_only:
            raise Refused(
                f"{left.move.service} may have served on {left.move.target} already: moving back is a move",
                step="abort",
                hint=f"fab migrate.resume; then: fab migrate --service {left.move.service} --to {left.move.source}",
            )
        _recover(fleet, seen, left, Options())
        return left.move


def _sweep(fleet: Fleet, seen: Seen) -> None:
    """What a run left that was overtaken by another: keys, labels without data, mail that is held."""
    stack = stacks.read(fleet.inventory)
    reached = [name for name, facts in seen.observed.hosts.items() if not facts.unreachable]
    fleet.each(acts.close, reached)
    for service in stack.services.values():
        if not service.volumes:
            continue
        labelled = [node for node in seen.swarm.nodes.values() if service.name in node.places]
        live = seen.live(service.name)
        if len(labelled) > 1 and len([node for node in labelled if node.host in live]) == 1:
            for node in labelled:
                if node.host not in live:
                    swarm.set_label(seen.manager, node.id, service.place_label, None)
                    report.progress(f"took the label of {service.name} off {node.host}, which has no live copy")
        with contextlib.suppress(Refused):
            hooks.of(fleet, stack, service.role).release()


def purge(fleet: Fleet, dry: bool) -> list[str]:
    """Remove the old copies that moves have left; a line for each. ``dry``: only say which."""
    seen = services.observe(fleet)
    stack = stacks.read(fleet.inventory)
    lines = []
    with lock.held(seen.manager, "migrate.purge", swarm=True):
        left = journal.read(seen.manager)
        if left is not None:
            raise Refused(
                f"a move of {left.move.text} is not over", step="purge", hint="first: fab migrate.resume, or .abort"
            )
        for service in stack.services.values():
            if not service.volumes:
                continue
            assert fleet.inventory.stack is not None
            wanted = fleet.inventory.stack.placement[service.name]
            where = place(fleet.inventory.cluster, stack, service, wanted, seen.observed.hosts, seen.swarm)
            for host, facts in seen.observed.hosts.items():
                if host == where.host or where.new:
                    continue
                for mark in markers_of(fleet.inventory.cluster, stack, service, facts).values():
                    # a live one without the label is a source that was lost and came back
                    left_behind = mark.state == LIVE and mark.generation < where.generation
                    if mark.state == model.STALE or left_behind:
                        lines.append(f"{host}: volume {mark.volume}, generation {mark.generation}")
                        if not dry:
                            acts.remove_copy(fleet[host], stack.name, service.name, mark.volume)
    return lines


def status(fleet: Fleet) -> list[str]:
    """Where a move stands, in lines for people."""
    left = journal.read(services.observe(fleet).manager)
    if left is None:
        return ["no move is under way"]
    move = left.move
    hint = (
        "it will be finished by: fab migrate.resume"
        if left.phase.is_forward_only
        else "fab migrate.resume begins it again, fab migrate.abort undoes it"
    )
    minutes = max(0.0, time.time() - move.started) / 60
    lines = [f"a move of {move.text} began {minutes:.0f} min ago and is in phase '{left.phase}'"]
    owner = next((o for o in bootstrap.locks(fleet).values() if o is not None), None)
    lines.append(owner.text if owner is not None and not lock.is_dead(owner) else f"nobody is at work on it; {hint}")
    return lines
