"""Whether a test has touched what ``bootstrap`` and ``deploy`` look at.

Run before each test only to find nothing to do, they take 1.3 s of a processor each time. What they found as wanted is
remembered here as it looks past SSH and the command line (a tenth of that), and they run when it looks different.

Not looked at: images, programs of the hosts, SSH, firewall rules but for our own. Tests that touch those put them back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import docker
from docker.errors import DockerException

from swarmmail.model import facts

if TYPE_CHECKING:
    from conftest import Project

Part = Literal["hosts", "stack"]
"""What bootstrap cares for, and what deploy does."""

_SCRIPTS: dict[Part, str] = {
    "hosts": """exec 2>/dev/null
cat /etc/wireguard/swarmmail.conf /etc/swarmmail/* /etc/systemd/system/swarmmail-guard.service \\
  /etc/systemd/system/docker.service.d/* /etc/docker/daemon.json
for ask in is-active is-enabled; do systemctl $ask docker.socket docker wg-quick@swarmmail swarmmail-guard; done
for what in public-key listen-port allowed-ips; do wg show swarmmail $what | sort; done
ip -o addr show dev swarmmail; ip -o link show dev swarmmail; ip -4 route
nft list tables; nft -s list table inet swarmmail
echo end
""",
    "stack": "exec 2>/dev/null; cat /var/lib/docker/volumes/*/_data/.swarmmail-volume; echo end",
}


class Known:
    def __init__(self, project: Project, hosts: Sequence[str]) -> None:
        self.project, self.hosts = project, hosts
        self._looks: dict[Part, object] = {}

    def remember(self, *parts: Part) -> None:
        """A command has just found these as wanted."""
        self._looks.update({part: self._look(part) for part in parts})

    def still(self, *parts: Part) -> bool:
        """They look as they did then."""
        return all(part in self._looks and self._looks[part] == self._look(part) for part in parts)

    def _look(self, part: Part) -> object:
        """What can't be seen (Docker does not answer, a host is off, virtual ones) equals nothing."""
        if self.project.driver.kind == "vm" or os.geteuid() != 0:
            return object()
        try:
            with contextlib.ExitStack() as opened, ThreadPoolExecutor() as pool:
                apis = [opened.enter_context(contextlib.closing(self._api(host))) for host in self.hosts]
                said = list(pool.map(lambda host: self.project.sh(host, _SCRIPTS[part], check=False), self.hosts))
                if any(not text.endswith("end\n") for text in said):
                    return object()
                if part == "hosts":
                    return [*said, *pool.map(_of_host, apis)]
                return [*said, *pool.map(_of_node, apis), self._of_stack(apis[0])]
        except (DockerException, OSError, subprocess.SubprocessError):
            return object()

    def _api(self, host: str) -> Any:
        """Docker of a host, by its socket as this machine sees it."""
        return docker.APIClient(f"unix:///proc/{self.project.init(host)}/root/run/docker.sock", "1.41", timeout=20)

    def _of_stack(self, api: Any) -> object:
        specs = [(one["ID"], one["Spec"]) for one in [*api.services(), *api.configs(), *api.secrets()]]
        labels = [(node["ID"], node["Spec"]["Labels"]) for node in api.nodes()]
        root = self.project.root
        own = [*(root / "stacks" / "mail").rglob("*"), *(root / ".lab").glob("*.crt"), *(root / ".lab").glob("*.key")]
        files = sorted((str(path), path.stat().st_mtime_ns) for path in own)
        return _sorted(specs), _sorted(labels), files, (root / "inventories" / "mail.yml").read_text()


def _of_host(api: Any) -> object:
    """Not of ``info``, for which Docker runs programs."""
    overlays = [(one["Id"], one["Name"]) for one in api.networks() if one["Scope"] != "local"]
    return sorted(overlays), facts.peers_of(api.inspect_network("ingress")), _of_swarm(api)


def _of_swarm(api: Any) -> object:
    nodes = []
    for node in api.nodes():
        spec, manager = node["Spec"], node.get("ManagerStatus") or {}
        wanted = spec["Role"], spec["Availability"], spec["Labels"].get("swarmmail.host")
        nodes.append((node["ID"], *wanted, node["Status"]["State"], manager.get("Reachability")))
    return _sorted(nodes)


def _of_node(api: Any) -> object:
    containers = [(one["Id"], one["State"], "(healthy)" in one["Status"]) for one in api.containers()]
    return sorted(containers), sorted(one["Name"] for one in api.volumes()["Volumes"] or ())


def _sorted(nodes: list[Any]) -> list[Any]:
    return sorted(nodes, key=lambda node: str(node[0]))
