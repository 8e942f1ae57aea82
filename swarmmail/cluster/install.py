"""Install Debian or Ubuntu packages that a host lacks, and start Docker."""

from __future__ import annotations

from swarmmail.hosts.connection import Host

APT_TIMEOUT = 900  # seconds

# docker-cli is a package of its own from Debian 13 on. iptables: Docker needs it, Debian only recommends it.
_INSTALL = """
set -e; export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=120 update >/dev/null
for p in docker-cli iptables; do
  case " $* " in *" docker.io "*) apt-cache show $p >/dev/null 2>&1 && set -- "$@" $p ;; esac
done
apt-get -qq -y -o DPkg::Lock::Timeout=120 install --no-install-recommends "$@" >/dev/null
case " $* " in *" docker.io "*) systemctl -q enable --now docker ;; esac
"""


def install(host: Host, packages: str) -> None:
    """``packages``: names, separated by blanks. Raises HostError with apt's last words."""
    host.run(f"set -- {packages}\n{_INSTALL}", step=f"install {packages}", timeout=APT_TIMEOUT)


def start_docker(host: Host) -> None:
    host.run(
        "systemctl -q enable docker; systemctl restart docker || { journalctl -u docker -n 3 -o cat >&2; exit 1; }",
        step="start Docker",
        timeout=120,
    )
