"""The acts of a move on real hosts. ``model/move.py`` says when each comes; ``host.sh`` is what is done on a host."""

from __future__ import annotations

import contextlib
import random
import re
import shlex
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import docker.errors
import tenacity

from swarmmail import report
from swarmmail.cluster import images, swarm
from swarmmail.hosts.connection import Host, Result
from swarmmail.hosts.dockerapi import update
from swarmmail.hosts.fleet import Fleet
from swarmmail.mail.hooks import Hooks
from swarmmail.model import stack as model
from swarmmail.model.errors import Deadline, HostError, Refused, SwarmmailError, Unreachable
from swarmmail.model.move import (
    HELD,
    STALE,
    STANDBY,
    Measured,
    Move,
    NotServing,
    Pass,
    Standstill,
    another_pass,
    marker,
    steps,
)
from swarmmail.model.patience import patient
from swarmmail.model.placement import LIVE
from swarmmail.model.stack import Service, StackFile
from swarmmail.model.swarm import PLACED

_SCRIPT = resources.files(__package__).joinpath("host.sh").read_text()
KEY_HOURS = 24
COPY_LIMIT = 24 * 3600  # seconds for one pass
STANDBY_LIMIT = patient(60)  # seconds for a task to be up and waiting
REVIVE_LIMIT = patient(30)
ENDED_LIMIT = patient(30)
STANDSTILL = 30  # seconds; a host, a disk, or a way that is slow does something meanwhile, a hanging rsync nothing
LOOK = 2  # seconds between two looks at a copy
GRACE = 10  # seconds for the service to end by itself
TIMED_OUT = 30
"""Exit status of rsync(1): nothing came for too long."""
BROKEN = frozenset((10, 12, TIMED_OUT, 35, 255))
"""Exit statuses of rsync(1) and ssh(1) that mean the connection, or what stands still: it is made again, and the copy
goes on."""
LIVE_PASS, LINKS_PASS, LAST_PASS = "live", "links", "last"
VANISHED = 24
"""A file went away while it was copied: nothing wrong while the service runs."""
MARGIN = 2
"""Seconds that a clock's second and a pass's beginning may be apart."""
FUTURE = 2**32
"""Seconds: no file is younger."""
SAMPLE = 200
"""Files whose contents are compared, besides those that have changed."""
HOLDER = "swarmmail.holder"
"""Label of a container that does nothing but hold a volume, so that no prune takes it."""
HOLDING = "while :; do sleep 3600; done # swarmmail holds this volume"


def verb(host: Host, name: str, *words: object, step: str, timeout: float = 60, check: bool = True) -> Result:
    """Run a verb of ``host.sh`` on a host.

    Raises:
        Refused: the host itself refused, in one sentence.
        HostError: it failed.
    """
    arguments = " ".join(shlex.quote(str(word)) for word in words)
    result = host.run(f"sh -s -- {name} {arguments}", stdin=_SCRIPT, step=step, timeout=timeout, check=False)
    if result.status == 3:
        lines = result.stderr.strip().splitlines()
        raise Refused(lines[-1] if lines else "refused", host=host.name, step=step, hint="see: fab migrate.status")
    if check and not result.ok:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise HostError(lines[-1] if lines else f"exit status {result.status}", host=host.name, step=step)
    return result


def folder(host: Host, volume: str) -> str:
    """Where Docker keeps a volume on a host (whether it is there already or not)."""
    with host.doing("look at the volumes"):
        return f"{host.docker.info()['DockerRootDir']}/volumes/{volume}/_data"


def measure(host: Host, volumes: tuple[str, ...]) -> Measured:
    paths = [folder(host, volume) for volume in volumes]
    words = verb(host, "measure", *paths, step="measure the volumes", timeout=600).stdout.split()
    return Measured(*map(int, words))


def close(host: Host) -> None:
    """Remove the keys, connections and copies under way of every move."""
    verb(host, "close", host.spec.user, step="remove what a move left")


@dataclass
class _Watched:
    """A pass, between who waits for its end and who looks whether it goes on."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    running: bool = False
    stood_still: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class HostActs:
    """See ``model.move.Acts``. What is done with a service that has data."""

    def __init__(
        self,
        fleet: Fleet,
        stack: StackFile,
        move: Move,
        manager: Host,
        hooks: Hooks,
        *,
        bwlimit: str = "0",
        files: int = 0,
    ) -> None:
        self.fleet, self.stack, self.move, self.manager, self.hooks = fleet, stack, move, manager, hooks
        self.source, self.target = fleet[move.source], fleet[move.target]
        self.service: Service = stack.services[move.service]
        self.bwlimit = bwlimit
        self.files = files
        """Files of the volumes, as the check counted them."""
        self.passes: tuple[Pass, ...] = ()
        self.lines: list[str] = []
        """What there is to see at the end."""
        self.gap: float | None = None
        """Seconds from before the stop until the service answered on the target."""
        self.steps = steps(
            move.service,
            move.source,
            move.target,
            hooks.live_copy,
            data=bool(move.volumes),
            hook=hooks.address_hook is not None,
        )
        self.failure: SwarmmailError | None = None
        """What people have to do by hand, although the move stands: its address hook has failed."""
        self._followed = False
        self._paths: dict[str, tuple[str, ...]] = {}
        self._copying_since = 0
        """When the first pass began: seconds, by the source's clock."""
        self._changed = FUTURE
        """Contents of files that are younger are compared: seconds, by the source's clock."""
        self._copied = 0
        """When the last one began that came to its end."""
        self._linked = 0
        """Names of one file are one on the target, too, if it has not changed since: seconds, by the source's clock."""
        self._stopped_at: float | None = None
        self._here = ""
        """The source's manifest, made when it had stopped."""
        self._chance = random.randrange(10**6)  # noqa: S311
        self._where = ""
        self._waiting = 0
        """First process of the standby."""

    # -- small helpers --

    def paths(self, host: Host) -> tuple[str, ...]:
        if host.name not in self._paths:
            self._paths[host.name] = tuple(folder(host, volume) for volume in self.move.volumes)
        return self._paths[host.name]

    def _mark(
        self, host: Host, node: str, generation: int, state: str, expected: str, step: str, move: str = "-"
    ) -> None:
        text = marker(self.fleet.inventory.cluster, self.move.service, generation, node, state)
        for path in self.paths(host):
            verb(host, "mark", move, path, text.rstrip("\n"), f",{expected},", step=step)

    def _mark_source(self, state: str, expected: str, step: str, move: str = "-") -> None:
        self._mark(self.source, self.move.source_node, self.move.generation - 1, state, expected, step, move)

    def _mark_target(self, state: str, expected: str, step: str) -> None:
        self._mark(self.target, self.move.target_node, self.move.generation, state, expected, step)

    def _containers(self, host: Host) -> list[dict[str, Any]]:
        """The service's containers that run on a host, as ``docker inspect`` shows them."""
        label = f"com.docker.swarm.service.name={self.stack.name}_{self.move.service}"
        with host.doing(f"look for {self.move.service}"):
            found = []
            for raw in host.docker.containers(filters={"label": label, "status": "running"}):
                with contextlib.suppress(docker.errors.NotFound):  # it has just gone
                    found.append(host.docker.inspect_container(raw["Id"]))
        return [raw for raw in found if raw["State"]["Running"]]

    def _released(self, host: Host, step: str) -> int:
        """The first process of the service's container on a host, once its fence has let it go; 0: there is none."""
        for raw in self._containers(host):
            words = host.run(f"tr '\\0' ' ' </proc/{raw['State']['Pid']}/cmdline", step=step, check=False).stdout
            if words and "/swarmmail-fence" not in words:
                return int(raw["State"]["Pid"])
        return 0

    def _runs(self) -> bool:
        """Whether the service runs on the target as the Swarm sees it: not before its health check has passed, and
        not while it starts anew, because a hand had taken the label. Only then a container is found there."""
        name = f"{self.stack.name}_{self.move.service}"
        filters = {"service": name, "node": self.move.target_node, "desired-state": "running"}
        with self.manager.doing(f"look for {self.move.service}"):
            return any(task["Status"]["State"] == "running" for task in self.manager.docker.tasks(filters=filters))

    # -- copy --

    def prepare(self) -> None:
        """Leftovers away, the image and volumes on the target, their markers, the key."""
        self.fleet.each(close, {self.source.name, self.target.name})
        self._image()
        labels = {
            model.STACK_LABEL: self.stack.name,
            "swarmmail.cluster": self.fleet.inventory.cluster,
            "swarmmail.service": self.move.service,
        }
        for volume, path in zip(self.move.volumes, self.paths(self.target), strict=True):
            with self.target.doing(f"make volume {volume}"):
                self.target.docker.create_volume(volume, labels=labels)
            verb(self.target, "what", path, self.fleet.inventory.cluster, self.move.service, step=f"look at {volume}")
        if verb(self.target, "writers", self.move.volumes[0], step="look who writes there").stdout.strip():
            raise Refused(
                "a container there writes to the volume already",
                host=self.target.name,
                step="prepare",
                hint=f"see which: docker ps --filter volume={self.move.volumes[0]}",
            )
        self._mark_target(STANDBY, f"none,older,{STALE},{STANDBY}", "mark the copy")
        self._hold_volumes(self.target)
        self._key()

    def _tag(self) -> str:
        """The image that the Swarm starts the service from, whatever the stack's files say by now."""
        with self.manager.doing(f"look at {self.move.service}"):
            spec = self.manager.docker.inspect_service(f"{self.stack.name}_{self.move.service}")["Spec"]
        return str(spec["TaskTemplate"]["ContainerSpec"]["Image"])

    def _image(self) -> bool:
        """The very image that is on the source, under its tag."""
        tag = self._tag()
        with self.source.doing("look at the image"):
            return self._bring(images.Builder(self.source.docker, self.source.name), tag)

    def _bring(self, where: images.Builder, tag: str) -> bool:
        """The image as it is ``where``, to the target; False when it is not there."""
        here = images.inspect(where.api, tag)
        with self.target.doing("look at the image"):
            there = images.inspect(self.target.docker, tag)
        if here is not None and (there is None or there.id != here.id):
            images.ship(self.fleet, where, {tag: [self.target.name]})
        return here is not None

    def _hold_volumes(self, host: Host) -> None:
        """A container that does nothing keeps the volumes from every prune, as long as no task has them."""
        name, image = f"swarmmail-holder-{self.stack.name}-{self.move.service}", self._tag()
        with host.doing("hold the volumes"):
            with contextlib.suppress(docker.errors.NotFound):
                if host.docker.inspect_container(name)["State"]["Running"]:
                    return
                host.docker.remove_container(name, force=True)
            api = host.docker
            binds = {volume: {"bind": f"/held/{i}", "mode": "ro"} for i, volume in enumerate(self.move.volumes)}
            config = api.create_host_config(
                binds=binds,
                network_mode="none",
                cap_drop=["ALL"],
                read_only=True,
                restart_policy={"Name": "unless-stopped"},
            )
            made = api.create_container(
                image,
                entrypoint=["/bin/sh", "-c", HOLDING],
                command=[],
                name=name,
                labels={HOLDER: self.move.service},
                user="65534:65534",
                healthcheck={"test": ["NONE"]},
                host_config=config,
            )
            api.start(made["Id"])

    def _drop_holder(self, host: Host) -> None:
        with host.doing("let go of the volumes"), contextlib.suppress(docker.errors.NotFound):
            host.docker.remove_container(f"swarmmail-holder-{self.stack.name}-{self.move.service}", force=True)

    def _key(self) -> None:
        move = self.move
        public = verb(self.source, "open_source", move.id, step="make the key").stdout.strip()
        address = verb(self.source, "addresses", step="read the addresses").stdout.split()
        allowed = ",".join(address)
        opened = verb(
            self.target,
            "open_target",
            move.id,
            self.target.spec.user,
            KEY_HOURS,
            allowed,
            public,
            *self.paths(self.target),
            step="let the copy in",
        ).stdout.splitlines()
        port = next((line.split()[1] for line in opened if line.startswith("port ")), str(self.target.spec.port))
        name = self.target.spec.advertise if port == "22" else f"[{self.target.spec.advertise}]:{port}"
        keys = [" ".join([name, *line.split()[:2]]) for line in opened if line.startswith(("ssh-", "ecdsa-"))]
        self._where = f"{self.target.spec.user}@{self.target.spec.advertise}"
        self._connect = (move.id, self._where, port, "\n".join(keys))
        self._connected()

    def _connected(self) -> None:
        try:
            verb(self.source, "connect", *self._connect, step="connect to the target", timeout=30)
        except HostError as error:
            raise HostError(
                f"SSH from {self.source.name} to {self._where} fails: {error.what.removeprefix('exit status 255: ')}",
                host=self.source.name,
                step="connect to the target",
                hint="the source must reach the target's SSH port: data goes from host to host",
            ) from None

    def precopy(self) -> None:
        if not self.hooks.live_copy:
            return
        while another_pass(self.passes):
            done = self._pass("copy", LIVE_PASS)
            self.passes = (*self.passes, done)
            report.progress(
                f"pass {len(self.passes)}: {done.files} files, {done.bytes / 1e6:.1f} MB in {done.seconds:.1f} s",
                self.source.name,
            )
        since = max(0, self._copied - MARGIN)
        try:
            self._pass("link", LINKS_PASS, since)
            self._linked = since
        except HostError as error:  # most likely a name has vanished
            report.progress(f"hard links are left for the last pass: {error.what}", self.source.name)
        verb(self.target, "settle", *self.paths(self.target), step="write the copy to the disk", timeout=600)

    def _pass(self, step: str, mode: str, since: int = 0) -> Pass:
        """One pass. A connection that breaks is made again, and a copy that stands still is ended and begun again; what
        is there already is not sent again.

        Args:
            mode: see ``pass`` in ``host.sh``.
            since: seconds, by the source's clock.
        """
        move, live = self.move, mode != LAST_PASS
        pairs = self.paths(self.source)
        assert pairs == self.paths(self.target) or len(pairs) == len(self.paths(self.target))

        watched, stalls = _Watched(), 0

        def once() -> Result:
            nonlocal stalls
            with watched.lock:
                watched.running, watched.stood_still = True, False
            result = verb(
                self.source,
                "pass",
                move.id,
                mode,
                since,
                self._linked,
                self._where,
                self.bwlimit,
                *[f"{a}={b}" for a, b in zip(pairs, self.paths(self.target), strict=True)],
                step=step,
                timeout=COPY_LIMIT,
                check=False,
            )
            what = "the connection to the target broke"
            with watched.lock:
                watched.running = False
                if watched.stood_still and not result.ok:
                    stalls += 1
                    what = f"it stood still for {STANDSTILL:g} s"
                    result = Result(TIMED_OUT, result.stdout, what)
            if again(result):
                report.progress(f"{step}: {what}; once more", self.source.name)
                self._connected()
            return result

        def again(result: Result) -> bool:
            """While the service is away, it is not waited for a third time."""
            return result.status in BROKEN and (live or stalls < 2)

        began = time.monotonic()
        threading.Thread(target=self._watch, args=(watched, live), daemon=True).start()
        try:
            result: Result = tenacity.Retrying(
                retry=tenacity.retry_if_result(again),
                stop=tenacity.stop_after_attempt(5),
                wait=tenacity.wait_exponential(0.2, max=5),
                retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
            )(once)
        finally:
            watched.ended.set()
        if not result.ok and not (live and result.status == VANISHED):
            said = (result.stderr.strip().splitlines() or [f"exit status {result.status}"])[0]
            raise HostError(f"the copy failed: {said}", host=self.source.name, step=step)
        if mode != LINKS_PASS and (clock := re.search(r"^began (\d+)$", result.stdout, re.M)) is not None:
            self._copied = int(clock[1])
            self._copying_since = self._copying_since or self._copied
        numbers = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+)", result.stdout)]
        return Pass(time.monotonic() - began, sum(numbers[0::2]), sum(numbers[1::2]))

    def _watch(self, watched: _Watched, show: bool) -> None:
        """While a pass is under way: how far it is, and whether it goes on at all."""
        still = Standstill(STANDSTILL)
        while not watched.ended.wait(LOOK):
            with contextlib.suppress(SwarmmailError):
                said = [
                    verb(host, "progress", self.move.id, step="progress", check=False).stdout.splitlines()
                    for host in (self.source, self.target)
                ]
                if still.reached([lines[:1] for lines in said], time.monotonic()):
                    still = Standstill(STANDSTILL)
                    self._end(watched)
                elif show and len(words := " ".join(said[0][1:]).split()) > 3:
                    report.progress(
                        f"copy: {words[0]} bytes, {words[1]}, {words[2]}, {words[3]} left", self.source.name
                    )

    def _end(self, watched: _Watched) -> None:
        """A pass that stands still, if it has not just ended by itself: its next try must not be met."""
        with watched.lock:
            if watched.running:
                watched.stood_still = True
                for host in (self.source, self.target):
                    with contextlib.suppress(SwarmmailError):
                        verb(host, "end", self.move.id, step="end a copy that stands still")

    def _up(self) -> int:
        """With the label, the service is up and well on the target: its first process there."""
        swarm.set_label(self.manager, self.move.target_node, self.service.place_label, PLACED)

        def up() -> int:
            for raw in self._containers(self.target):
                if (raw["State"].get("Health") or {}).get("Status", "healthy") == "healthy":
                    return int(raw["State"]["Pid"])
            return 0

        pid = swarm.wait_until(up, bool, STANDBY_LIMIT)
        if not pid:
            raise Deadline(
                f"{self.move.service} was not up there within {STANDBY_LIMIT:g} s",
                host=self.target.name,
                step="standby",
                hint=f"see why: docker service ps --no-trunc {self.stack.name}_{self.move.service}",
            )
        return pid

    def standby(self) -> None:
        """The service is up on the target, and its fence waits."""
        self._waiting = self._up()
        self.hooks.ready()
        if self.hooks.live_copy:
            self._pass("copy", LIVE_PASS)  # so that the last one has seconds to catch up with, not a minute

    # -- stop --

    def hold(self) -> None:
        self._first = [raw["State"]["Pid"] for raw in self._containers(self.source)]
        self.hooks.hold()

    def stop(self) -> None:
        self._stopped_at = time.monotonic()
        self._mark_source(HELD, f"{LIVE},{HELD}", "hold the source", self.move.id)
        port = f"{self.hooks.port:04X}" if self.hooks.port else "-"
        names = " ".join(self.move.volumes)
        verb(self.source, "stop", self.move.id, port, GRACE, names, *self._first, step="stop the source", timeout=60)

    def final(self) -> None:
        """What has changed since the last pass began, and hard links; the comparison finds what that should miss."""
        # without an earlier pass nothing has changed since the first, and the sample remains
        self._changed = self._copying_since - MARGIN if self._copying_since else FUTURE
        with ThreadPoolExecutor(1) as pool:  # the source rests by now: it can be listed meanwhile
            here = pool.submit(self._manifest, self.source)
            done = self._pass("last copy", LAST_PASS, max(0, self._copied - MARGIN))
        self._here = here.result()
        report.progress(
            f"last pass: {done.files} files, {done.bytes / 1e6:.1f} MB in {done.seconds:.2f} s", self.source.name
        )

    def compare(self) -> None:
        there = self._manifest(self.target)
        if there != self._here and self.hooks.live_copy:
            report.progress("the last pass has missed something; once more, over everything", self.source.name)
            self._pass("last copy", LAST_PASS)
            there = self._manifest(self.target)
        if there != self._here:
            raise HostError(
                f"the copy differs from {self.source.name}: {self._difference()}",
                host=self.target.name,
                step="compare",
                hint="nothing was lost; run the same command again; if it differs again, without the copy that is "
                "there: fab migrate.purge",
            )
        entries = [line.split() for line in there.splitlines()]
        self.lines.append(
            f"compared: {sum(int(words[0]) for words in entries)} entries by name, size, owner, mode and time, "
            f"{sum(int(words[2]) for words in entries)} files by content"
        )

    def _manifest(self, host: Host) -> str:
        """What a host has, as a text: equal on both sides if they are."""
        step = max(1, self.files // SAMPLE)
        return verb(
            host,
            "manifest",
            self.move.id,
            "yes" if host is self.target else "no",
            self._changed,
            1 + self._chance % step,
            step,
            self.hooks.also,
            *self.paths(host),
            step="compare both sides",
            timeout=600,
        ).stdout

    def _difference(self) -> str:
        def listing(host: Host) -> set[str]:
            return set(verb(host, "listing", self.move.id, step="compare both sides", timeout=120).stdout.splitlines())

        found = self.fleet.each(listing, (self.source.name, self.target.name))
        here, there = found[self.source.name], found[self.target.name]
        several = [f"only {self.source.name}: {line}" for line in sorted(here - there)[:3]]
        several += [f"only {self.target.name}: {line}" for line in sorted(there - here)[:3]]
        return "; ".join(several) or "the contents of files that changed, or of the sample"

    # -- cutover --

    def cutover(self) -> None:
        if self.move.source_is_dead:
            self._shut_out()
            self._mark_target(LIVE, f"{STALE},{STANDBY},{LIVE}", "make the old copy live")
            swarm.set_label(self.manager, self.move.source_node, self.service.place_label, None)
            swarm.set_label(self.manager, self.move.target_node, self.service.place_label, PLACED)
        else:
            self._mark_target(LIVE, f"{STANDBY},{LIVE}", "make the copy live")

    def _shut_out(self) -> None:
        """From now on the fence refuses every older generation, also on a source that comes back."""
        api, name = self.manager.docker, f"{self.stack.name}_{self.move.service}"

        def raise_it() -> None:
            raw = api.inspect_service(name)
            spec = raw["Spec"]
            container = spec["TaskTemplate"]["ContainerSpec"]
            env = container.get("Env") or ()
            wanted = f"SWARMMAIL_GENERATION={self.move.generation}"
            if wanted not in env:
                others = [entry for entry in env if not entry.startswith("SWARMMAIL_GENERATION=")]
                container["Env"] = [*others, wanted]
                update(api, "services", raw, spec)

        with self.manager.doing(f"raise the generation of {name}"):
            swarm.unless_overtaken(raise_it)

    def serve(self) -> None:
        pid, problem = self._waiting, ""
        for once_more in (False, True):
            if once_more:  # its container was started anew meanwhile, or a hand has taken the label
                swarm.set_label(self.manager, self.move.target_node, self.service.place_label, PLACED)
                pid = swarm.wait_until(lambda: self._released(self.target, "serve"), bool, STANDBY_LIMIT)
            elif pid and not verb(self.target, "started", pid, step="serve", timeout=30, check=False).ok:
                pid = 0
            if not pid:
                problem = "its container did not start"
                continue
            try:
                self.hooks.answers(self.target, pid)
            except Unreachable:
                raise
            except SwarmmailError as error:
                problem = error.what
                continue
            if self._stopped_at is not None:
                self.gap = time.monotonic() - self._stopped_at
            return
        raise self._not_serving("serve", f"does not answer: {problem}")

    def _not_serving(self, step: str, problem: str) -> NotServing:
        return NotServing(
            f"{self.move.service} is on {self.target.name} and {problem}",
            host=self.target.name,
            step=step,
            hint=f"see why: docker service ps --no-trunc {self.stack.name}_{self.move.service}; mend it there; or move "
            f"it back: fab migrate --service {self.move.service} --to {self.move.source}",
        )

    def address(self) -> None:
        try:
            self.hooks.follow(self.source, self.target)
            self._followed = True
        except SwarmmailError as error:
            report.warning(f"address hook: {error.what}; the move goes on, and the hook is run once more at its end")

    def release(self) -> None:
        self.hooks.release()

    # -- after --

    def tidy(self) -> None:
        close(self.target)
        if not self.move.source_is_dead:
            self._mark_source(STALE, f"{HELD},{STALE}", "mark the old copy")
            self._hold_volumes(self.source)
            close(self.source)
        swarm.set_label(self.manager, self.move.target_node, self.service.place_label, PLACED)  # a hand may take it
        swarm.set_label(self.manager, self.move.source_node, self.service.place_label, None)
        self._drop_holder(self.target)
        if not self.move.source_is_dead:
            self._ended(self.source)

    def _ended(self, host: Host) -> None:
        """Wait until the service's container is gone from a host, and its ports are free."""
        swarm.wait_until(lambda: not self._containers(host), bool, ENDED_LIMIT)

    def after(self) -> None:
        if not swarm.wait_until(self._runs, bool, STANDBY_LIMIT):
            raise self._not_serving("after", f"has not been well there for {STANDBY_LIMIT:g} s")
        self.lines += self.hooks.after()
        if not self._followed:  # it failed, or a run that was killed may not have come to it
            try:
                self.hooks.follow(self.source, self.target)
            except SwarmmailError as error:
                self.failure = error

    # -- undo --

    def revive(self) -> None:
        """The source lives again. The Swarm starts its task anew if it was stopped; then that is waited for."""
        self._mark_source(LIVE, f"{HELD},{LIVE}", "make the source live again")

        pid = swarm.wait_until(lambda: self._released(self.source, "revive"), bool, REVIVE_LIMIT)
        if pid and self.hooks.port:
            with contextlib.suppress(HostError):
                self.hooks.answers(self.source, pid)

    def retreat(self) -> None:
        close(self.source)
        try:
            close(self.target)
            if self._marked(self.target).get("state") == STANDBY:
                self._mark_target(STALE, STANDBY, "mark the copy")
        except HostError as error:  # away, or its disk is full
            # its marker says standby and its label goes: without a label nothing starts there
            report.warning(f"{error}; its copy is left as it is, and can't be started")
        swarm.set_label(self.manager, self.move.target_node, self.service.place_label, None)

    def give_up(self, lost: Host) -> None:
        """The host that the service is on is lost: what the other one has is an older copy from now on."""
        if lost.name == self.target.name:
            close(self.source)
            self._mark_source(STALE, f"{HELD},{STALE}", "mark the old copy")
            swarm.set_label(self.manager, self.move.source_node, self.service.place_label, None)
        else:
            close(self.target)
            swarm.set_label(self.manager, self.move.target_node, self.service.place_label, None)

    def _marked(self, host: Host) -> Mapping[str, str]:
        text = host.run(
            f"cat {shlex.quote(self.paths(host)[0])}/.swarmmail-volume 2>/dev/null || true", step="read the marker"
        ).stdout
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def remove_copy(host: Host, stack: str, service: str, volume: str) -> None:
    """Remove an old copy for good."""
    with host.doing(f"remove volume {volume}"):
        with contextlib.suppress(docker.errors.NotFound):
            host.docker.remove_container(f"swarmmail-holder-{stack}-{service}", force=True)
        # the Swarm keeps the containers of tasks that have ended for a while; one that runs makes the engine refuse
        for raw in host.docker.containers(all=True, filters={"volume": volume}):
            if raw["State"] in ("exited", "dead", "created"):
                with contextlib.suppress(docker.errors.NotFound):
                    host.docker.remove_container(raw["Id"])
        host.docker.remove_volume(volume)
