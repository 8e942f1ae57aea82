"""The WireGuard mesh on the hosts: keys, configuration, guard, units. See ``model/mesh.py`` for the text.

Order on a host: the guard first (nothing leaves in clear, nothing foreign comes in), then the tunnel, and
Docker after both, at every boot.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from importlib import resources

from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.model.bootstrap import Design
from swarmmail.model.errors import HostError
from swarmmail.model.facts import MESH
from swarmmail.model.mesh import CONFIG_FILE, KEY_FILE, LOST, Mesh
from swarmmail.model.network import DATA_PORT

GUARD = "/etc/swarmmail/guard"
UNIT = "/etc/systemd/system/swarmmail-guard.service"
DROP_IN = "/etc/systemd/system/docker.service.d/swarmmail.conf"
NEW = f"/etc/wireguard/{MESH}.new"
"""Folder in which the configuration waits: ``wg-quick`` knows a file by its link's name."""

PATIENCE = 30
"""Seconds for the first handshake from a new port: longer than the keepalive, should nothing else be sent."""

_GUARD_UNIT = f"""\
# Written by swarmmail bootstrap.
[Unit]
Description=VXLAN by the tunnel only (swarmmail)
DefaultDependencies=no
StartLimitIntervalSec=0
After=local-fs.target systemd-modules-load.service
Before=network-pre.target docker.service wg-quick@{MESH}.service
Wants=network-pre.target

[Service]
ExecStartPre={GUARD} apply
ExecStart={GUARD} watch
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""

_DOCKER_DROP_IN = f"""\
# Written by swarmmail bootstrap. Docker's VXLAN socket must not open before the guard stands: if the guard
# cannot be set, Docker does not start.
[Unit]
After=swarmmail-guard.service wg-quick@{MESH}.service
Wants=swarmmail-guard.service wg-quick@{MESH}.service

[Service]
ExecStartPre={GUARD} apply
"""

_MAKE_KEY = f"""
set -e; umask 077; mkdir -p /etc/wireguard
[ -s {KEY_FILE} ] || {{
  wg genkey >{KEY_FILE}.new; sync {KEY_FILE}.new; mv {KEY_FILE}.new {KEY_FILE}; sync /etc/wireguard
}}
wg pubkey <{KEY_FILE}
"""

# A running tunnel is changed in place (wg syncconf, wg(8)): sessions of peers that stay are not cut. syncconf
# without a PrivateKey would take the key away, so it is put back in, by files and pipes only.
# The configuration takes its place last of all, or while the tunnel is down: should this be killed, the next run sees
# the old one, or none at work, and does it again. Without `sync` a power cut soon after leaves empty files: rename(2)
# orders no data. One at a time: what a killed run has begun here goes on for a moment.
_ACTIVATE = f"""
set -e; umask 077
exec 9>/run/{MESH}.lock; flock -w 40 9
rm -rf {NEW}; tar -xf - -C / --no-same-owner
sync {GUARD} {UNIT} {DROP_IN} {NEW}/{MESH}.conf
known=$(systemctl show -p FragmentPath --value swarmmail-guard.service)
stale=$(systemctl show -p NeedDaemonReload --value docker.service swarmmail-guard.service | grep yes || true)
[ -n "$known" ] && [ -z "$stale" ] || systemctl daemon-reload
{GUARD} apply
systemctl -q enable swarmmail-guard.service wg-quick@{MESH}.service 2>/dev/null
systemctl restart swarmmail-guard.service
if wg show {MESH} >/dev/null 2>&1 && systemctl -q is-active wg-quick@{MESH}.service &&
   ip -4 -o addr show dev {MESH} | grep -q " $1/"; then
  {{ echo '[Interface]'; printf 'PrivateKey = '; cat {KEY_FILE}
     wg-quick strip {NEW}/{MESH}.conf | grep -v '^.Interface.'; }} >/run/{MESH}.sync
  wg syncconf {MESH} /run/{MESH}.sync; rm -f /run/{MESH}.sync
  ip link set dev {MESH} mtu "$2"
  mv -T {NEW}/{MESH}.conf {CONFIG_FILE}
else
  systemctl stop wg-quick@{MESH}.service 2>/dev/null || true
  ip link del {MESH} 2>/dev/null || true
  mv -T {NEW}/{MESH}.conf {CONFIG_FILE}
  systemctl reset-failed wg-quick@{MESH}.service 2>/dev/null || true
  systemctl start wg-quick@{MESH}.service || {{ journalctl -n 3 -o cat -u wg-quick@{MESH}.service >&2; exit 1; }}
fi
rmdir {NEW}
sync /etc/systemd/system /etc/wireguard
exec 9>&-
shift 2
# Syncing, as starting, gave a host behind NAT a new port. WireGuard repeats a handshake every 5 s.
tries=0
for key; do
  until wg show {MESH} latest-handshakes | awk -v key="$key" -v since=$(($(date +%s) - {LOST})) '
      $1 == key && $2 > since {{ heard = 1 }} END {{ exit !heard }}' || [ $tries -ge {PATIENCE} ]; do
    tries=$((tries + 1)); sleep 1
  done
done
"""


def files(mesh: Mesh) -> dict[str, str]:
    """What a host must hold besides its own configuration: path to content."""
    guard = resources.files(__package__).joinpath("guard.sh").read_text()
    for name, value in (("@PORT@", DATA_PORT), ("@LINK@", MESH), ("@SUBNET@", mesh.subnet)):
        guard = guard.replace(name, str(value))
    return {
        GUARD: guard,
        UNIT: _GUARD_UNIT,
        DROP_IN: _DOCKER_DROP_IN,
    }


def digests(mesh: Mesh) -> dict[str, str]:
    return {path: hashlib.sha256(text.encode()).hexdigest() for path, text in files(mesh).items()}


def make_key(host: Host) -> str:
    """Make the host's private key, unless it has one; it never leaves the host. The public key."""
    key = host.run(_MAKE_KEY, step="make the tunnel's key").stdout.strip()
    if len(key) != 44:  # 32 bytes in base64
        raise HostError("wg printed no public key", host=host.name, step="make the tunnel's key")
    return key


def activate(host: Host, mesh: Mesh, config: str, lost: str = "") -> None:
    """Put the files in place, then guard and tunnel in force. Run again, it changes nothing that is right.

    ``lost``: public keys of peers that are to be heard of again; no error when they are not.
    """
    content = {f"{NEW}/{MESH}.conf": config + "\n", **files(mesh)}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, text in content.items():
            data = text.encode()
            info = tarfile.TarInfo(path.lstrip("/"))
            info.size = len(data)
            info.mode = 0o755 if path == GUARD else 0o600 if path.startswith(NEW) else 0o644
            tar.addfile(info, io.BytesIO(data))
    words = f"{mesh.addresses[host.name]} {mesh.mtu} {lost}".strip()
    host.run(f"set -- {words}\n{_ACTIVATE}", stdin=archive.getvalue(), step="start the tunnel", timeout=60 + PATIENCE)


def build(fleet: Fleet, design: Design, lost: Mapping[str, str]) -> None:
    """Keys where they are missing, then the tunnel on the hosts of ``lost``, all at once. It names, by host, the public
    keys of peers that this is to bring back."""
    assert design.mesh is not None
    mesh = design.mesh
    keys: dict[str, str] = dict(design.keys)
    keys.update(fleet.each(make_key, [name for name in design.inventory.hosts if name not in keys]))
    fleet.each(lambda host: activate(host, mesh, design.mesh_config(host.name, keys), lost[host.name]), lost)
