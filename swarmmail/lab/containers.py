"""Lab hosts as containers of this machine's Docker. The labels on Docker's objects are the only state."""

from __future__ import annotations

import contextlib
import io
import socket
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import IPAMConfig, IPAMPool
from tenacity import (
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_delay,
    wait_fixed,
)

from swarmmail import report
from swarmmail.lab import image, rights
from swarmmail.lab.driver import Access, Kind, Machine
from swarmmail.lab.naming import TOPOLOGIES, Naming, Planned, Subnets, Topology, Variant, routes
from swarmmail.model.errors import SwarmmailError

_LAB, _HOST, _VARIANT, _ADDRESS, _TOPOLOGY = (
    "swarmmail.lab",
    "swarmmail.lab.host",
    "swarmmail.lab.variant",
    "swarmmail.lab.address",
    "swarmmail.lab.topology",
)
_BOOT = 90  # seconds until SSH must answer: 1 to 2 s usually, more on a busy machine with many hosts
_DOCKER = 90  # seconds for the host's Docker, counted from SSH's answer
_ROUTER = 20  # seconds until the router translates: 0.3 s usually
_REMOVAL = 15  # seconds for Docker to finish removals that are under way, without any progress of ours
_LATE = 1  # second: what a killed `lab.up` had asked Docker for appears after its end, and is looked for once more
# Instances of inotify: counted 7 a host (systemd 5, dbus-daemon, containerd), one for a wireguard-go; and
# what the machine itself uses.
_INOTIFY, _INOTIFY_REST = 8, 16

_ANEW = "lab.down, then lab.up: makes the lab anew"

# Version 2 of control groups, else version 1: bytes in use, then the statistics.
_MEMORY = """cd /sys/fs/cgroup
if [ -e memory.current ]; then cat memory.current memory.stat; else
cat memory/memory.usage_in_bytes memory/memory.stat; fi"""

T = TypeVar("T")
S = TypeVar("S")


class ContainerDriver:
    """The lab of one folder. Raises SwarmmailError when there is no Docker on this machine."""

    kind: Kind = "container"

    def __init__(self, naming: Naming) -> None:
        self.naming = naming
        try:
            self.client: Any = docker.from_env()
            self.client.ping()
        except (DockerException, OSError) as error:
            raise SwarmmailError(
                f"no Docker answers on this machine: {error}",
                step="lab",
                hint="start Docker (systemctl start docker), or see DOCKER_HOST",
            ) from error
        if self.client.api.base_url != "http+docker://localhost":
            raise SwarmmailError(
                f"the lab needs Docker on this machine, not on {self.client.api.base_url}",
                step="lab",
                hint="unset DOCKER_HOST",
            )

    # --- network ---

    def network(self, topology: Topology | None) -> Subnets:
        found = self._found()
        outer = found.get(self.naming.network)
        there = outer[1] if outer else None
        if there and topology not in (None, there):
            raise SwarmmailError(
                f"the lab is {there}, asked for is {topology}: hosts keep the networks they were made on",
                step="lab.up --topology",
                hint=f"lab.down (the hosts' data goes with it), then lab.up --topology {topology}",
            )
        wanted = there or topology or "flat"
        names = {self.naming.network: self.naming.bridge}
        if wanted == "nat":
            names[self.naming.inner_network] = self.naming.inner_bridge
        if names.keys() - found.keys() and self.machines():
            raise SwarmmailError(
                "the lab's hosts are there but their network is gone",
                step="lab",
                hint="lab.down, then lab.up",
            )
        made = [found[name][0] if name in found else self._make(name, names[name], wanted) for name in names]
        return Subnets(*made)

    def _make(self, name: str, bridge: str, topology: Topology) -> IPv4Network:
        """Make a network with a bridge of its own. Docker lets nothing pass from one bridge to another."""
        table = Path("/proc/net/route").read_text()
        mtu = _underlay_mtu(table)
        taken = [network for _, network in routes(table) if network.prefixlen] + self._docker_subnets()
        options = {"com.docker.network.bridge.name": bridge, "com.docker.network.driver.mtu": str(mtu)}
        if name == self.naming.inner_network:
            # This machine must not be a second way out, beside the router.
            options["com.docker.network.bridge.enable_ip_masquerade"] = "false"
        for subnet in self.naming.subnets(taken):
            try:
                self.client.api.create_network(
                    name,
                    driver="bridge",
                    ipam=IPAMConfig(pool_configs=[IPAMPool(subnet=str(subnet))]),
                    check_duplicate=True,
                    labels={_LAB: self.naming.id, _TOPOLOGY: topology},
                    options=options,
                )
            except APIError as error:
                if "overlap" in str(error):  # another lab took it since we looked
                    continue
                raise SwarmmailError(str(error.explanation), step="make the lab's network") from error
            report.progress(f"network {subnet} made (bridge {bridge}, MTU {mtu})")
            return subnet
        raise SwarmmailError("no free subnet left in 198.18.0.0/15", step="make the lab's network")

    def find_network(self) -> Subnets | None:
        found = self._found()
        inner = found.get(self.naming.inner_network)
        outer = found.get(self.naming.network)
        return Subnets(outer[0], inner[0] if inner else None) if outer else None

    def _found(self) -> dict[str, tuple[IPv4Network, Topology]]:
        """Subnet of each network that is there, and the topology it was made for."""
        return {
            network["Name"]: (
                IPv4Network(network["IPAM"]["Config"][0]["Subnet"]),
                TOPOLOGIES[network["Labels"].get(_TOPOLOGY, "flat")],
            )
            for network in self.client.api.networks(filters={"label": f"{_LAB}={self.naming.id}"})
        }

    def _docker_subnets(self) -> list[IPv4Network]:
        return [
            IPv4Network(pool["Subnet"])
            for network in self.client.api.networks()
            for pool in network["IPAM"].get("Config") or []
            if ":" not in pool.get("Subnet", ":")
        ]

    # --- machines ---

    def machines(self, memory: bool = False) -> list[Machine]:
        listed = [
            Machine(
                name=container["Labels"][_HOST],
                address=container["Labels"][_ADDRESS],
                variant=container["Labels"][_VARIANT],
                state=container["State"],
                nat=container["Labels"].get(_TOPOLOGY) == "nat",
            )
            for container in self.client.api.containers(
                all=True, filters={"label": [f"{_LAB}={self.naming.id}", _HOST]}
            )
        ]
        listed.sort(key=lambda machine: int(machine.address.rpartition(".")[2]))  # the number is for life
        if memory:
            listed = _parallel(self._weighed, listed)
        return listed

    def _weighed(self, machine: Machine) -> Machine:
        if machine.state != "running":
            return machine
        # Not from Docker's statistics: they make all but the first who asks wait for the next second.
        try:
            code, text = self._run(machine.name, ["sh", "-c", _MEMORY], 10)
        except APIError:  # it went down since it was listed
            return machine
        # A host that is going down has no statistics any more, and answers with nothing.
        return replace(machine, memory=memory_in_use(text)) if code == 0 and text else machine

    def ensure(self, wanted: Sequence[Planned], access: Access) -> list[str]:
        present = {machine.name: machine for machine in self.machines()}
        subnets = self.find_network()
        if subnets is None:
            raise SwarmmailError("the lab's network is gone", step="lab", hint="lab.down, then lab.up")
        self._check_room(len([h for h in wanted if h.name not in present or present[h.name].state != "running"]))
        missing: list[Variant] = sorted({host.variant for host in wanted if host.name not in present})
        images = {variant: image.ensure(self.client, variant) for variant in missing}
        changed = self._route(subnets)

        def bring(host: Planned) -> str | None:
            started = time.monotonic()
            try:
                change = self._start(host, present.get(host.name), subnets, images, access)
                version = self._wait(host, subnets.address(host))
                if self._let_in(host, access) and change is None:
                    change = "access renewed"
            except (DockerException, OSError) as error:
                raise SwarmmailError(
                    f"{error}\n{self._last_words(host.name)}", host=host.name, step="lab.up"
                ) from error
            if change:
                seconds = time.monotonic() - started
                what = f"SSH and Docker {version} answer" if version else "SSH answers"
                report.progress(f"{change}; {what} at {subnets.address(host)} after {seconds:.1f} s", host.name)
                return host.name
            return None

        return changed + [name for name in _parallel(bring, list(wanted)) if name]

    # --- the router ---

    def router(self) -> str:
        found = self.client.api.containers(all=True, filters={"name": f"^/{self.naming.router}$"})
        return str(found[0]["State"]) if found else ""

    def _route(self, subnets: Subnets) -> list[str]:
        """Get the router running where there is to be one (``image/lab-router`` says what it does)."""
        if subnets.inner is None:
            return []
        api, name = self.client.api, self.naming.router
        before = self.router()
        try:
            if before == "paused":
                api.unpause(name)
            elif before != "running":
                if not before:
                    self._create_router(subnets)
                if self.naming.inner_network not in api.inspect_container(name)["NetworkSettings"]["Networks"]:
                    api.connect_container_to_network(name, self.naming.inner_network, ipv4_address=subnets.gateway)
                api.start(name)
            self._wait_for_translation()
        except (DockerException, OSError) as error:
            raise SwarmmailError(f"{error}\n{self._last_words('router')}", host="router", step="lab.up") from error
        if before == "running":
            return []
        report.progress(f"translates {subnets.inner} to {subnets.router}", "router")
        return ["router"]

    def _create_router(self, subnets: Subnets) -> None:
        make = partial(
            self.client.api.create_container,
            image.ensure(self.client, "host"),
            name=self.naming.router,
            hostname="router",
            entrypoint=["/usr/local/sbin/lab-router"],
            labels={_LAB: self.naming.id},
            environment={
                "LAB_INSIDE": subnets.gateway,
                "LAB_OUTSIDE": subnets.router,
                "LAB_UPLINK": str(subnets.outer.network_address + 1),
            },
            stop_signal="SIGKILL",
            networking_config={
                "EndpointsConfig": {self.naming.network: {"IPAMConfig": {"IPv4Address": subnets.router}}}
            },
            host_config={
                "NetworkMode": self.naming.network,
                "CapDrop": ["ALL"],
                "CapAdd": ["NET_ADMIN", "NET_RAW"],
                "MaskedPaths": [],
                "ReadonlyPaths": [],  # it sets sysctls of its own network
                "RestartPolicy": {"Name": "unless-stopped"},
            },
        )
        self._new(self.naming.router, make)

    def _wait_for_translation(self) -> None:
        for attempt in Retrying(
            retry=retry_if_exception_type(OSError), wait=wait_fixed(0.05), stop=stop_after_delay(_ROUTER), reraise=True
        ):
            with attempt:
                try:
                    code, output = self._run("router", ["nft", "list", "table", "ip", "router"], 10)
                except APIError as error:  # 409: it is being started again
                    raise ConnectionError(str(error)) from error
                if code:
                    raise ConnectionError(f"the router does not translate: {output}")

    # --- hosts ---

    def _check_room(self, more: int) -> None:
        """The kernel's limit on inotify instances is one for root on the whole machine, hosts included.

        Over it, systemd in the host fails at boot with "Too many open files".
        """
        limit = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
        running = len(self.client.api.containers(filters={"label": [_LAB, _HOST]}))  # other labs' too
        if more and (running + more) * _INOTIFY + _INOTIFY_REST > limit:
            raise SwarmmailError(
                f"{running + more} hosts need {(running + more) * _INOTIFY + _INOTIFY_REST} inotify instances, "
                f"this machine allows {limit}",
                step="lab.up",
                hint="sysctl -w fs.inotify.max_user_instances=1024, or end another lab",
            )

    def _start(
        self,
        host: Planned,
        machine: Machine | None,
        subnets: Subnets,
        images: dict[Variant, str],
        access: Access,
    ) -> str | None:
        """Get the container running. What had to be done for it, None: nothing."""
        container = self.naming.container(host.name)
        if machine and machine.state == "running":
            return None
        if machine and machine.state == "paused":
            self.client.api.unpause(container)
            return "unpaused"
        if machine is None:
            self._create(host, images[host.variant], subnets)
        self.client.api.put_archive(container, "/", _access_files(access))
        self.client.api.start(container)
        return "made" if machine is None or machine.state == "created" else "started"

    def _create(self, host: Planned, image_tag: str, subnets: Subnets) -> None:
        inside = subnets.inside(host.name)
        network = self.naming.inner_network if inside else self.naming.network
        labels = {
            _LAB: self.naming.id,
            _HOST: host.name,
            _VARIANT: host.variant,
            _ADDRESS: subnets.address(host),
            _TOPOLOGY: "nat" if inside else "flat",
        }
        volume = self.naming.volume(host.name)
        # A volume without its host belongs to nobody: a new host starts empty.
        _gone(partial(self.client.api.remove_volume, volume))
        self.client.api.create_volume(volume, labels={_LAB: self.naming.id, _HOST: host.name})
        make = partial(
            self.client.api.create_container,
            image_tag,
            name=self.naming.container(host.name),
            hostname=host.name,
            labels=labels,
            environment={
                "container": "docker",
                "LAB_RESOLVERS": " ".join(_resolvers()),
                "LAB_GATEWAY": subnets.gateway if inside else "",
            },
            stop_signal="SIGRTMIN+3",
            networking_config={"EndpointsConfig": {network: {"IPAMConfig": {"IPv4Address": subnets.address(host)}}}},
            host_config={
                "NetworkMode": network,
                "CapDrop": ["ALL"],
                "CapAdd": rights.grantable(),
                "SecurityOpt": rights.SECURITY_OPTIONS,
                # `--security-opt systempaths=unconfined` of the CLI is this: the host sets its own sysctls.
                "MaskedPaths": [],
                "ReadonlyPaths": [],
                "DeviceCgroupRules": list(rights.DEVICES),
                "CgroupnsMode": "private",
                # Empty after a reboot, as systemd expects (file-hierarchy(7)).
                "Tmpfs": {
                    "/run": "rw,exec,nosuid,nodev,mode=755",
                    "/run/lock": "rw,noexec,nosuid,nodev,mode=1777",
                    "/tmp": "rw,exec,nosuid,nodev,mode=1777",  # noqa: S108
                },
                # A volume: overlay2 cannot stand on the container's own overlay and would fall back to vfs.
                "Binds": [f"{volume}:/var/lib/docker"],
                # `reboot` in the host, and the machine's own, bring it back; `docker stop` is for good.
                "RestartPolicy": {"Name": "unless-stopped"},
            },
        )
        self._new(self.naming.container(host.name), make)

    def _new(self, container: str, make: Callable[[], object]) -> None:
        try:
            make()
        except APIError as error:
            if error.status_code != 409:
                raise
            # The name is taken by a container that was not listed: what a killed `up` had asked Docker for.
            _gone(partial(self.client.api.remove_container, container, force=True, v=True))
            make()

    def _wait(self, host: Planned, address: str) -> str:
        """Until the host is ready: version of its Docker, or nothing on a bare one.

        Raises SwarmmailError with the host's last words when it ends or its time is over.
        """
        self._wait_for_banner(host, address)
        if host.variant == "bare":
            return ""
        # docker.service is of type notify: `start` returns when the API answers, or the service failed.
        code, output = self._run(host.name, ["systemctl", "start", "docker.service"], _DOCKER)
        if code:
            raise SwarmmailError(
                f"Docker in the host did not start (status {code}): {output}\n{self._last_words(host.name)}",
                host=host.name,
                step="start Docker",
                hint=_ANEW,
            )
        code, output = self._run(host.name, ["docker", "version", "-f", "{{.Server.Version}}"], 20)
        if code:
            raise SwarmmailError(f"Docker in the host: {output}", host=host.name, step="ask Docker")
        return output.split("+")[0]

    def _wait_for_banner(self, host: Planned, address: str) -> None:
        def banner() -> None:
            with socket.create_connection((address, 22), timeout=2) as connection:
                if not connection.recv(64).startswith(b"SSH-2.0-"):
                    raise ConnectionError("no SSH banner")

        deadline = time.monotonic() + _BOOT
        while True:
            try:
                for attempt in Retrying(
                    retry=retry_if_exception_type(OSError),
                    wait=wait_fixed(0.05),
                    stop=stop_after_delay(2),
                    reraise=True,
                ):
                    with attempt:
                        banner()
                return
            except OSError as error:
                state = self.client.api.inspect_container(self.naming.container(host.name))["State"]
                if state["Status"] != "running" or time.monotonic() > deadline:
                    raise SwarmmailError(
                        f"SSH does not answer at {address}: {error}; the container is {state['Status']}"
                        f"\n{self._last_words(host.name)}",
                        host=host.name,
                        step="boot",
                        hint=_ANEW,
                    ) from error

    def _let_in(self, host: Planned, access: Access) -> bool:
        """Renew keys and password where they are not those of ``access``. Whether that was needed."""
        code, output = self._run(host.name, ["cat", "/root/.ssh/authorized_keys"], 20)
        if code == 0 and output == access.public_key:
            return False
        self.client.api.put_archive(self.naming.container(host.name), "/", _access_files(access))
        code, output = self._run(host.name, ["lab-accounts"], 20)
        if code:
            raise SwarmmailError(output, host=host.name, step="set the lab's key and password")
        return True

    def host_keys(self, names: Sequence[str]) -> dict[str, str]:
        def key(name: str) -> str:
            for _ in range(20):  # under load Docker 20.10 loses the output of an exec now and then (3 of 300)
                code, output = self._run(name, ["cat", "/etc/ssh/ssh_host_ed25519_key.pub"], 20)
                if code or output:
                    break
            if code or not output:
                raise SwarmmailError(output, host=name, step="read the SSH host key")
            return " ".join(output.split()[:2])

        return dict(zip(names, _parallel(key, list(names)), strict=True))

    def _run(self, name: str, command: list[str], seconds: int) -> tuple[int, str]:
        """Run a command in the host, past SSH. Its exit status (124: time over) and all it wrote."""
        api = self.client.api
        job = api.exec_create(self.naming.container(name), ["timeout", "-k", "2", str(seconds), *command])
        output = api.exec_start(job["Id"])
        while (code := api.exec_inspect(job["Id"])["ExitCode"]) is None:  # its output ends a little before it
            time.sleep(0.01)
        return code, output.decode(errors="replace").strip()

    def _last_words(self, name: str) -> str:
        """The end of the host's journal; of the container's output when nothing runs any more."""
        try:
            code, text = self._run(name, ["journalctl", "--no-pager", "-o", "short-monotonic", "-n", "12"], 10)
            if code == 0 and text:
                return text
        except (DockerException, OSError):
            pass
        try:
            log: bytes = self.client.api.logs(self.naming.container(name), tail=12)
            return log.decode(errors="replace").strip() or "(it left no log)"
        except (DockerException, OSError) as error:
            return f"(no log: {error})"

    # --- the end ---

    def enter(self) -> list[str]:
        return []

    def power_off(self, host: str) -> None:
        with contextlib.suppress(APIError):  # 409: it is off
            self.client.api.kill(self.naming.container(host))

    def remove(self, images: bool = False) -> list[str]:
        removed: list[str] = []
        volumes: set[str] = set()
        progress = time.monotonic()
        try:
            while True:
                before = len(removed)
                try:
                    self._remove_all(removed, volumes)
                    if len(removed) == before:
                        break
                except APIError as error:  # perhaps in use by what is only coming: looked for in the next round
                    if not _is_busy(error) or time.monotonic() - progress > _REMOVAL:
                        raise
                if len(removed) > before:
                    progress = time.monotonic()
                time.sleep(_LATE)
            if images:
                removed += image.remove_all(self.client)
        except DockerException as error:
            raise SwarmmailError(str(error), step="lab.down", hint="run lab.down again") from error
        return removed

    def _remove_all(self, removed: list[str], volumes: set[str]) -> None:
        """Remove what is listed, and note it. ``volumes``: those of containers, by name and until they are gone: what a
        container that came late has made anew has no label of ours."""
        label = {"label": f"{_LAB}={self.naming.id}"}
        api = self.client.api

        def kill(container: dict[str, Any]) -> None:
            _gone(partial(api.remove_container, container["Id"], force=True, v=True))
            removed.append(f"container {container['Names'][0].lstrip('/')}")

        containers = api.containers(all=True, filters=label)
        volumes |= {mount["Name"] for container in containers for mount in container["Mounts"] if mount.get("Name")}
        _parallel(kill, containers)
        volumes |= {volume["Name"] for volume in api.volumes(filters=label)["Volumes"] or []}
        for volume in sorted(volumes):
            with contextlib.suppress(NotFound):
                api.remove_volume(volume)
                removed.append(f"volume {volume}")
            volumes.remove(volume)
        for network in api.networks(filters=label):
            for guest in api.inspect_network(network["Id"]).get("Containers") or {}:
                _gone(partial(api.disconnect_container_from_network, guest, network["Id"], force=True))
            with contextlib.suppress(NotFound):
                api.remove_network(network["Id"])
                removed.append(f"network {network['Name']}")


def memory_in_use(text: str) -> int:
    """Bytes in use without the page cache that the kernel can drop, as ``docker stats`` counts."""
    first, *statistics = text.splitlines()
    cache = dict(line.split() for line in statistics)
    return int(first) - int(cache.get("total_inactive_file") or cache.get("inactive_file") or 0)


def _gone(remove: Callable[[], object]) -> None:
    """Remove something. That it is gone already is as good; while Docker still removes what hangs on it, wait."""
    for attempt in Retrying(
        retry=retry_if_exception(_is_busy), wait=wait_fixed(0.2), stop=stop_after_delay(_REMOVAL), reraise=True
    ):
        with attempt, contextlib.suppress(NotFound):
            remove()


def _is_busy(error: BaseException) -> bool:
    """409: removal in progress, volume in use; 403: the network has endpoints."""
    return isinstance(error, APIError) and error.status_code in (403, 409)


def _parallel(work: Callable[[S], T], items: list[S]) -> list[T]:
    """Results in order. All are finished before the first error is raised."""
    if not items:
        return []
    with ThreadPoolExecutor(max_workers=len(items)) as pool:
        jobs = [pool.submit(work, item) for item in items]
    return [job.result() for job in jobs]


def _access_files(access: Access) -> bytes:
    """A tar archive to unpack at the host's root: who may log in (owners are those of the recipe)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, owner, text in (
            ("root/.ssh/authorized_keys", 0, access.public_key + "\n"),
            ("home/admin/.ssh/authorized_keys", 1000, access.public_key + "\n"),
            ("home/deploy/.ssh/authorized_keys", 1001, access.public_key + "\n"),
            ("etc/lab-password", 0, f"admin:{access.sudo_password}\n"),
        ):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.uid, entry.gid = len(text), 0o600, owner, owner
            entry.mtime = int(time.time())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def _underlay_mtu(table: str) -> int:
    """MTU of the device of the machine's default route, at most 1500: more is lost on the way out."""
    for device, network in routes(table):
        if network.prefixlen == 0:
            return min(1500, int(Path(f"/sys/class/net/{device}/mtu").read_text()))
    return 1500


def _resolvers() -> list[str]:
    """The machine's name servers that a host can reach too. None: only ones on loopback; Docker's must do."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        if Path(path).exists():
            fields = [line.split() for line in Path(path).read_text().splitlines()]
            servers = [field[1] for field in fields if len(field) > 1 and field[0] == "nameserver"]
            reachable = [server for server in servers if ":" not in server and not server.startswith("127.")]
            if reachable:
                return reachable
    return []
