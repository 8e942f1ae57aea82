"""What virtual hosts are started from: kernel, initial RAM file system and disk, made by ``vm/build`` only when the
recipe changed, and kept in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from swarmmail import report
from swarmmail.lab import image
from swarmmail.model.errors import SwarmmailError

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "xz": "xz-utils",
    "nft": "nftables",
    "ip": "iproute2",
}
"""What the machine must have, with Debian's package of it."""
KERNEL_WORKS = 10
"""Seconds in which a kernel boots and powers off: less than 2 by hardware. A KVM that is there, and can't run a stock
kernel, stops without a word, or never."""
HARDWARE, SOFTWARE = "kvm", "tcg,thread=multi,tb-size=256"
"""tb-size: MiB of translated code that are kept, beside the host's memory; Docker and mail need about so many."""


@dataclass(frozen=True)
class Base:
    """A folder with what ``vm/build`` makes."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.ext4"

    def initrd(self, extra: Sequence[Entry] = ()) -> bytes:
        """The initial RAM file system; ``extra`` is what one host has beyond the others."""
        entries = [Entry(name, 0o40755) for name in ("proc", "dev", "root", "bin", "modules")]
        entries.append(Entry("bin/busybox", 0o100755, (self.folder / "busybox").read_bytes()))
        entries.append(Entry("init", 0o100755, recipe()["vm/init"]))
        for module in sorted((self.folder / "modules").iterdir()):
            entries.append(Entry(f"modules/{module.name}", 0o100644, module.read_bytes()))
        return archive([*entries, *extra])


@dataclass(frozen=True)
class Entry:
    """A file or folder of an initial RAM file system."""

    name: str
    mode: int
    content: bytes = b""
    owner: int = 0


def archive(entries: Sequence[Entry]) -> bytes:
    """A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, entry.owner, entry.owner, 1, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        out += bytes(-len(out) % 4) + entry.content
        out += bytes(-len(out) % 4)
    return bytes(out)


def recipe() -> dict[str, bytes]:
    """The files that decide what is built, by name."""
    folder = resources.files("swarmmail.lab").joinpath("vm")
    own = {f"vm/{entry.name}": entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    shared = image.recipe()
    return own | {f"image/{name}": shared[name] for name in ("sshd.conf", "lab-accounts")}


def cache(environment: Mapping[str, str]) -> Path:
    """The XDG base directory for what can be made anew."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarmmail" / "vm"


def ensure() -> Base:
    """What the recipe makes, built now if it is not in the cache (about a minute).

    Raises:
        SwarmmailError: a program is missing, or the build failed; with its last words.
    """
    need_programs()
    files = recipe()
    digest = hashlib.sha256(b"".join(b"%s\0%d\0%s" % (n.encode(), len(c), c) for n, c in sorted(files.items())))
    home = cache(os.environ)
    base = Base(home / digest.hexdigest()[:12])
    home.mkdir(parents=True, exist_ok=True)
    lock = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two labs may need it at once
        if not base.folder.exists():
            _build(files, home / "unfinished", base.folder)
    finally:
        os.close(lock)
    return base


def need_programs() -> None:
    """Raises SwarmmailError that names what is missing, with the command that installs it."""
    if os.geteuid() != 0:
        raise SwarmmailError("virtual hosts need root: a network of their own", step="lab", hint="run it with sudo")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)]
    if missing:
        raise SwarmmailError(
            f"virtual hosts need {', '.join(missing)}",
            step="lab",
            hint=f"apt-get install --no-install-recommends {' '.join(missing)}",
        )


def _build(files: Mapping[str, bytes], work: Path, result: Path) -> None:
    report.progress(f"building {result} (about a minute)")
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    for name, content in files.items():
        path = work / "recipe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    target = work / "target"
    target.mkdir()
    done = subprocess.run(
        ["sh", str(work / "recipe" / "vm" / "build"), str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise SwarmmailError(
            f"status {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}", step="build the hosts' disk"
        )
    target.rename(result)
    shutil.rmtree(work)


def accelerator(base: Base) -> str:
    """``HARDWARE`` where this machine's KVM runs a stock kernel, else ``SOFTWARE``. Tried once in a boot of the
    machine, by booting the hosts' own kernel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return SOFTWARE
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = base.folder / f"kvm-works-{boot}"
    if not known.exists():
        known.write_text("yes" if _runs(base) else "no")
    return HARDWARE if known.read_text() == "yes" else SOFTWARE


def _runs(base: Base) -> bool:
    initrd = base.folder / "probe.initrd"
    initrd.write_bytes(base.initrd())
    command = [*machine(HARDWARE, 256), "-no-reboot", "-serial", "stdio", *boot(base, initrd)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KERNEL_WORKS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return b"the kernel runs" in done.stdout


def machine(accelerator: str, memory: int) -> list[str]:
    """A bare QEMU machine of ``memory`` MiB."""
    # With ERMS, kernel and libc clear and copy memory by one instruction. Emulated, that goes byte by byte: a copy
    # takes three times as long.
    cpu = "max,-erms" if accelerator == SOFTWARE else "max"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"),
        *("-accel", accelerator, "-cpu", cpu, "-m", str(memory)),
    ]


def boot(base: Base, initrd: Path) -> list[str]:
    # panic=-1: reboot at once. The device is named eth0. Of no use to an emulated processor, and slow, are mitigations
    # and, by far more, programs at a random address: at each start what they run is translated anew (a quarter of the
    # time without it). By hardware neither matters to a lab.
    words = "console=ttyS0 quiet panic=-1 mitigations=off norandmaps random.trust_cpu=on net.ifnames=0"
    words += " systemd.show_status=0"
    return ["-kernel", str(base.kernel), "-initrd", str(initrd), "-append", words]


def remove_all() -> list[str]:
    """Remove every disk that recipes of ours made, but for those that another lab is running."""
    home = cache(os.environ)
    running = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    removed = []
    for folder in sorted(home.iterdir()) if home.exists() else ():
        if str(folder).encode() not in running:
            shutil.rmtree(folder)
            removed.append(f"folder {folder}")
    return removed
