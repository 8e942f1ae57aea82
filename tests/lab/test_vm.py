"""Hosts with kernels of their own (``lab.up --driver vm``): Docker's IPsec for real, lost power, cut cables.

One lab for the whole file, in this order: hosts that nothing was done to, then the cluster with mail. Each test leaves
it as it was. Emulated hosts are slow, and slower where other work goes on: everything is waited for, nothing is timed.
"""

from __future__ import annotations

import contextlib
import imaplib
import json
import re
import shutil
import smtplib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, Result, eventually, temporary
from mailing import PASSWORD, imap, send, verdicts
from test_runbooks import execute

from swarmmail.lab.naming import Naming

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

INVENTORY = "lab"
"""The inventory that ``lab.up`` wrote: host1 is the manager and has MTA and edge, host2 the MDA; encryption: auto."""
ENVIRONMENT = {"SWARMMAIL_INVENTORY": INVENTORY, "SWARMMAIL_PATIENCE": "4"}
SLOW = 1500
"""Seconds for a command: a deadline for what hangs, not what it should take."""
ALICE = "alice@lab.test"
DELIVERY = "mta@host1 -> mda@host2"
PAIRS = {DELIVERY, "mda@host2 -> mta@host1", "edge@host1 -> mda@host2", "mda@host2 -> edge@host1"}


def fab(project: Project, *words: str, **options: Any) -> Result:
    return project.fab(*words, env=ENVIRONMENT, timeout=SLOW, **options)


def verify(project: Project) -> dict[str, dict[str, Any]]:
    return verdicts(fab(project, "verify", "--json"))


def a_mail_crosses(project: Project) -> None:
    token = ""

    def sent() -> bool:
        nonlocal token
        with contextlib.suppress(OSError, smtplib.SMTPException):
            token = send(project, ALICE)
        return bool(token)

    eventually(sent, 300, "a mail is accepted")
    eventually(lambda: token in inbox(project), 300, "and delivered")


def inbox(project: Project) -> set[str]:
    """Subjects of the mails in alice's inbox; none when the MDA does not answer."""
    parts: list[Any] = []
    with contextlib.suppress(OSError, imaplib.IMAP4.error), imap(project, ALICE, PASSWORD) as client:
        client.select("INBOX", readonly=True)
        parts = client.fetch("1:*", "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])")[1]
    text = b"".join(part[1] for part in parts if isinstance(part, tuple))
    return set(re.findall(r"Subject: (\S+)", text.decode()))


@pytest.fixture(scope="module")
def hosts(place: Path) -> Iterator[Project]:
    """Two virtual hosts, with nothing done to them."""
    with temporary(place, "virtual", "vm") as project:
        fab(project, "lab.up", "--driver", "vm", check=0)
        yield project


@pytest.fixture(scope="module")
def mail(hosts: Project) -> Project:
    """The same hosts after ``bootstrap`` and ``deploy``, with an account."""
    result = fab(hosts, "bootstrap", "--no-check", "deploy", "--no-verify", check=0)
    assert "encryption: ipsec (every kernel accepts an ESP state with AES-GCM)" in result.output
    fab(hosts, "user.add", ALICE, stdin=f"{PASSWORD}\n", check=0)
    return hosts


# ---- before the first step ----

NO_ESP = "does not take an ESP state with AES-GCM"
WITHOUT = {  # per host: modules that its kernel may not load, and what `check` says of it
    "esp4, and xt_bpf with its stand-in": {
        "host1": ("esp4", NO_ESP),
        "host2": ("xt_bpf,xt_u32", "takes neither -m bpf nor -m u32"),
    },
    "gcm, and xt_policy": {
        "host1": ("gcm,aesni_intel", NO_ESP),
        "host2": ("xt_policy", "does not take an iptables rule with -m policy"),
    },
    "xfrm_user, and with a wrong clock": {"host1": ("xfrm_user", NO_ESP), "host2": ("", "s from the others' middle")},
}


@pytest.fixture
def only_ipsec(hosts: Project) -> str:
    """An inventory that asks for ipsec: with ``auto`` WireGuard would be taken where a kernel lacks ESP."""
    return hosts.inventory("ipsec", ("host1", "host2"), managers=1, network={"encryption": "ipsec"})


@pytest.mark.parametrize("case", WITHOUT)
def test_check_finds_a_host_without(case: str, hosts: Project, only_ipsec: str) -> None:
    try:
        for host, (modules, _) in WITHOUT[case].items():
            if modules == "xfrm_user":
                hosts.sh(host, "systemctl stop docker.socket docker")  # which holds it
            if modules:
                fab(hosts, "lab.module", "--host", host, "--forbid", modules, check=0)
            else:
                fab(hosts, "lab.clock", "--host", host, "--by", "2h", check=0)
            hosts.sh(host, "systemctl start docker")
        result = fab(hosts, "check", "--json", "--inventory", only_ipsec, check=2)
        found = json.loads(result.stdout)["findings"]
        errors = [(one["where"], one["measured"]) for one in found if one["level"] == "error"]
        for host, (_, text) in WITHOUT[case].items():
            assert any(where == host and text in measured for where, measured in errors), str(result)
    finally:
        for host, (modules, _) in WITHOUT[case].items():
            fab(hosts, "lab.module" if modules else "lab.clock", "--host", host, check=0)


# ---- the proof ----


def test_docker_s_own_encryption_is_proven(mail: Project) -> None:
    a_mail_crosses(mail)
    found = verify(mail)
    assert set(found) == PAIRS
    for one in found.values():
        assert (one["verdict"], one["causes"]) == ("proven", []), one
        text = "\n".join(one["evidence"])
        assert len(re.findall(r"ESP [1-9]\d* out [1-9]\d* back, in clear: 0 of this network, 0 markers", text)) == 2
        assert len(re.findall(r"control [1-9]", text)) == 2, text
        assert re.search(r"forged in \d+ ways: [1-9]\d* reached host\d, 0 delivered", text), text
    assert "message of 10 MB: 250" in "\n".join(found[DELIVERY]["evidence"])


def test_only_esp_is_on_the_wire_and_nothing_uses_the_ingress_network(mail: Project, tmp_path: Path) -> None:
    """Docker does not encrypt its ingress network: no packet of it, nor any other VXLAN in clear, may leave a host."""
    with capture(mail, tmp_path / "wire.pcap", "udp port 4789 or ip proto 50") as file:
        a_mail_crosses(mail)
    seen = subprocess.run(["tcpdump", "-nr", str(file)], capture_output=True, text=True, check=True).stdout
    assert "ESP(spi=" in seen
    assert [line for line in seen.splitlines() if "ESP(spi=" not in line] == []
    published = mail.sh("host1", "docker service inspect -f '{{json .Endpoint.Ports}}' $(docker service ls -q)")
    assert '"host"' in published and "ingress" not in published, published


@contextlib.contextmanager
def capture(project: Project, file: Path, words: str) -> Iterator[Path]:
    """What crosses the lab's bridge meanwhile."""
    command = [*project.driver.enter(), "tcpdump", "--immediate-mode", "-Uni", project.bridge, "-w", str(file), words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert "listening on" in running.stderr.readline()
        try:
            yield file
        finally:
            running.terminate()


# ---- leaks and black holes ----


def test_esp_that_is_lost_on_the_way_is_a_black_hole(mail: Project) -> None:
    fab(mail, "lab.cut", "--between", "host1,host2", "--only", "esp", check=0)
    try:
        found = verify(mail)
        assert {pair: one["names"][0] for pair, one in found.items()} == dict.fromkeys(PAIRS, "black-hole"), found
    finally:
        assert "esp" in fab(mail, "lab.mend", check=0).stdout


def test_a_mark_that_is_gone_on_one_host_is_a_leak(mail: Project) -> None:
    """The other host drops what comes in clear: to the users a black hole, to the eavesdropper a mailbox. And it has no
    ESP states, as after a start without esp4, or of another program's IPsec."""
    mail.sh("host1", "iptables -t mangle -F OUTPUT")
    mail.sh("host2", "ip xfrm state flush")
    one = verify(mail)[DELIVERY]
    assert one["verdict"] == "broken" and one["names"][0] in ("clear-text", "clear-vxlan"), one
    assert {"mark-missing", "no-states", "black-hole"} <= set(one["names"]), one


def test_rules_that_are_gone_on_both_hosts_are_a_leak_that_nobody_feels(mail: Project) -> None:
    """Executes ``docs/runbooks/firewall-was-reloaded.md``, with the mend."""
    for host in ("host1", "host2"):
        mail.sh(host, "iptables -t mangle -F OUTPUT; iptables -F INPUT")
    a_mail_crosses(mail)
    execute(mail, "firewall-was-reloaded", timeout=SLOW, **ENVIRONMENT)


# ---- new keys ----

# The one place in dockerd that holds 12 hours in nanoseconds: how often the leader makes new keys for encrypted
# overlays (swarmkit, manager/keymanager, DefaultKeyRotationInterval). There is no option for it.
SOON = """
set -e
python3 - <<'END'
hours, minute = ((seconds * 10**9).to_bytes(8, "little") for seconds in (12 * 3600, 60))
program = open("/usr/sbin/dockerd", "rb").read()
assert program.count(hours) == 1, program.count(hours)
open("/usr/sbin/dockerd.soon", "wb").write(program.replace(hours, minute))
END
chmod 755 /usr/sbin/dockerd.soon
cp -p /usr/sbin/dockerd /usr/sbin/dockerd.real
mv /usr/sbin/dockerd.soon /usr/sbin/dockerd
systemctl restart docker
"""
AS_EVER = "mv /usr/sbin/dockerd.real /usr/sbin/dockerd && systemctl restart docker"


def test_new_keys_are_taken_without_a_gap(mail: Project) -> None:
    """Docker makes them every 12 hours; here the leader's dockerd thinks that a minute is that long."""

    def indexes() -> set[str]:
        return set(re.findall(r"spi (0x\w+)", mail.sh("host2", "ip xfrm state list nokeys")))

    before = indexes()
    mail.sh("host1", SOON)
    try:
        eventually(lambda: indexes() - before, 600, "host2 has ESP states by a new key")
        a_mail_crosses(mail)
        assert {pair: one["verdict"] for pair, one in verify(mail).items()} == dict.fromkeys(PAIRS, "proven")
    finally:
        mail.sh("host1", AS_EVER)


# ---- lost power ----


def test_no_accepted_mail_is_lost_with_the_power(mail: Project) -> None:
    """First the MDA's host, while mail arrives; then the other one, the manager and the MTA's, with what it queued.
    What was written right before is there. Afterwards executes ``docs/runbooks/host-lost-power.md``."""
    sender = Sender(mail)
    try:
        eventually(lambda: len(sender.accepted) >= 5, 120, "five mails are accepted")
        fab(mail, "lab.module", "--host", "host2", "--forbid", "dummy", check=0)
        fab(mail, "lab.power", "off", "--host", "host2", check=0)
        before = len(sender.accepted)
        eventually(lambda: len(sender.accepted) >= before + 5, 300, "mail is accepted while the MDA is away")
        fab(mail, "lab.power", "off", "--host", "host1", check=0)
    finally:
        sender.stop()
    mail.disconnect()
    assert [machine.state for machine in mail.machines] == ["off", "off"]
    assert "host1, host2" in fab(mail, "lab.up", check=0).stdout
    assert "install dummy" in mail.sh("host2", "cat /etc/modprobe.d/lab.conf")
    missing: list[str] = []

    def delivered() -> bool:
        missing[:] = set(sender.accepted) - inbox(mail)
        return not missing

    with contextlib.suppress(AssertionError):
        eventually(delivered, 900)
    assert missing == [], f"of {len(sender.accepted)} mails"
    execute(mail, "host-lost-power", timeout=SLOW, **ENVIRONMENT)


class Sender:
    """Sends mails one after the other; knows which were accepted."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.accepted: list[str] = []
        self._going = True
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        while self._going:
            with contextlib.suppress(OSError, smtplib.SMTPException):
                self.accepted.append(send(self.project, ALICE))
            time.sleep(0.2)

    def stop(self) -> None:
        self._going = False
        self._thread.join()


# ---- the end ----


def test_nothing_is_left(hosts: Project) -> None:
    """Also not of hosts that still run, of a cut, or of the folder when its owner removed it."""
    naming = Naming.of(hosts.root)
    fab(hosts, "lab.cut", "--host", "host1", check=0)
    hosts.disconnect()
    assert traces(naming) != []
    shutil.rmtree(hosts.root / ".lab")
    fab(hosts, "lab.down", check=0)
    assert traces(naming) == []
    assert not (hosts.root / ".lab").exists()


def traces(naming: Naming) -> list[str]:
    """Processes, namespaces, links and mounts of a lab, by name."""
    commands = [
        path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    ]
    links = [path.name for path in Path("/sys/class/net").iterdir()]
    spaces = [path.name for path in Path("/run/netns").glob("*")]
    mounts = Path("/proc/mounts").read_text().splitlines()
    return [
        *(line for line in commands if line.startswith("qemu") and naming.id in line),
        *(name for name in [*links, *spaces, *mounts] if naming.id in name),
    ]
