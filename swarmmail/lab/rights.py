"""The rights of a lab host's container, one by one, with the reason: what ``--privileged`` would give unseen.

``--privileged`` also fails where the machine's own bounding set lacks a capability ("unable to apply caps:
operation not permitted"), as in many virtual machines; a list can be cut to what is there.

This is no sandbox. A host must mount, make network devices and start containers, so whoever is root in a
lab host can become root on the machine. What is held back is what a *mistake* in a host could break on the
machine: its clock, its kernel modules, its disks.
"""

from __future__ import annotations

from pathlib import Path

# Capability (capabilities(7)) -> why a host needs it. Not needed, so not given: AUDIT_READ, BLOCK_SUSPEND,
# IPC_OWNER, LEASE, MAC_ADMIN, MAC_OVERRIDE, NET_BROADCAST, SYSLOG, SYS_MODULE (the kernel loads by alias what
# it is asked for), SYS_PACCT, SYS_RAWIO, SYS_TIME, WAKE_ALARM; and BPF, PERFMON and CHECKPOINT_RESTORE,
# which Docker 20.10 does not know (SYS_ADMIN stands for them).
CAPABILITIES: dict[str, str] = {
    "AUDIT_CONTROL": "pam_loginuid writes the login's audit id at each SSH login",
    "AUDIT_WRITE": "sshd and sudo send audit records; containers get it by default",
    "CHOWN": "apt, docker load, rsync: files of other owners",
    "DAC_OVERRIDE": "root reads and writes files whatever their mode; containers get it by default",
    "DAC_READ_SEARCH": "root walks trees of other users (rsync of a mail store)",
    "FOWNER": "chmod and utime on files of others (tar, rsync)",
    "FSETID": "keeps setgid bits when files change (tar, rsync); containers get it by default",
    "IPC_LOCK": "systemd locks the memory of credentials",
    "KILL": "systemd and Docker end processes of other users",
    "LINUX_IMMUTABLE": "chattr +i and +a, journald's files",
    "MKNOD": "Docker unpacks images with device nodes (whiteouts too); tmpfiles makes /dev/net/tun",
    "NET_ADMIN": "bridges, VXLAN, WireGuard, IPsec states, iptables and nftables in the host's own network",
    "NET_BIND_SERVICE": "ports 22, 25, 143, 993",
    "NET_RAW": "ping, tcpdump, iptables",
    "SETFCAP": "apt and docker load: files with capabilities",
    "SETGID": "every service with a group of its own",
    "SETPCAP": "Docker and systemd take rights away from what they start",
    "SETUID": "sshd, sudo, every service with a user of its own",
    "SYS_ADMIN": "mounts, name spaces, control groups: systemd and Docker are made of them",
    "SYS_BOOT": "`reboot` ends this host's process tree; Docker starts it again",
    "SYS_CHROOT": "sshd's and Postfix's jails; Docker's layers",
    "SYS_NICE": "scheduling of units and containers",
    "SYS_PTRACE": "Docker and ss look into name spaces of other processes",
    "SYS_RESOURCE": "limits above the hard limit, OOM scores below zero (systemd and Docker do without)",
    "SYS_TTY_CONFIG": "vhangup at the end of a terminal session",
}

# Docker's seccomp profile forbids keyctl and parts of mount and clone that nested containers use; its
# AppArmor profile forbids mount; SELinux labels would keep the inner Docker from its volume.
SECURITY_OPTIONS: list[str] = ["seccomp=unconfined", "apparmor=unconfined", "label=disable"]

# Device nodes that may be opened beyond Docker's defaults (null, zero, random, tty, ptmx, pts). No disk.
DEVICES: dict[str, str] = {
    "c 10:200 rwm": "/dev/net/tun: wireguard-go",
}

# Number of the bit in a capability set, by position: linux/capability.h.
_BITS: tuple[str, ...] = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *(
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
    ),
    *(
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
    ),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL"),
    *("SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ"),
    *("PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)


def decode(mask: int) -> set[str]:
    """Names of the capabilities in a set, without ``CAP_``; bits this list does not know are left out."""
    return {name for bit, name in enumerate(_BITS) if mask >> bit & 1}


def bounding_set(status: str) -> set[str]:
    """The capabilities a process can ever have, by the text of ``/proc/PID/status`` (proc_pid_status(5))."""
    for line in status.splitlines():
        if line.startswith("CapBnd:"):
            return decode(int(line.split()[1], 16))
    raise ValueError("no CapBnd line: is this /proc/PID/status?")


def grantable() -> list[str]:
    """What of ``CAPABILITIES`` this machine has to give, sorted."""
    return sorted(bounding_set(Path("/proc/self/status").read_text()) & CAPABILITIES.keys())
