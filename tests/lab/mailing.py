"""What the tests of the mail stack share: variants of the stack, a look at its services, mail clients.

The clients connect from this machine to the hosts' own addresses, as the world does, and trust the lab's CA.
"""

from __future__ import annotations

import contextlib
import imaplib
import json
import re
import secrets
import shutil
import smtplib
import ssl
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conftest import HOSTS, MAIL, STACK, Project, Result, eventually

DONE = r"^deploy: mail taken by host1 \(SMTP\) and read back from host3 \(IMAP\) \d+\.\d\d s after it was accepted$"
"""The last line of a deploy that did something, when each service is where the inventory begins it."""
_DONE_ANYWHERE = DONE.replace("host1", r"host\d").replace("host3", r"host\d")

PASSWORD = "a secret of the tests"

Edit = Callable[[str], str]


# ---- the stack ----


def deploy(project: Project, *words: str, inventory: str = MAIL, timeout: float = 120, **options: Any) -> Result:
    return project.fab("deploy", "--no-verify", "--inventory", inventory, *words, timeout=timeout, **options)


def healed(project: Project, inventory: str = MAIL) -> Result:
    """A normal deploy mends what there is to mend; after it a mail travels, and nothing is left to do."""
    result = deploy(project, inventory=inventory, check=0)
    assert result.stdout == "deploy: nothing to do\n" or re.search(_DONE_ANYWHERE, result.stdout, re.M), str(result)
    if result.stdout == "deploy: nothing to do\n":
        project.fab("probe", "--inventory", inventory, check=0)
    assert deploy(project, inventory=inventory, check=0).stdout == "deploy: nothing to do\n"
    if inventory == MAIL:
        project.known.remember("stack")
    return result


def verdicts(result: Result) -> dict[str, Any]:
    """Of a ``verify --json``, the verdicts by pair; each with ``names``, those of its causes."""
    found = json.loads(result.stdout)
    assert (result.status == 0) == found["proven"], str(result)
    return {one["pair"]: {**one, "names": [cause["name"] for cause in one["causes"]]} for one in found["pairs"]}


def variant(project: Project, name: str, edits: Mapping[str, Edit] | None = None, **stack: Any) -> str:
    """An inventory NAME whose stack is a copy of ``stacks/mail``, with some files changed; ``stack`` changes its
    section. It is a variant of the same stack: its name in Docker is the same."""
    folder = project.root / "stacks" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(project.root / "stacks" / "mail", folder)
    for path, edit in (edits or {}).items():
        before = (folder / path).read_text()
        after = edit(before)
        assert after != before, f"{path} was not changed"
        (folder / path).write_text(after)
    return project.inventory(name, stack={**STACK, "path": f"../stacks/{name}", **stack})


def forget(project: Project, service: str) -> None:
    """Its data was somewhere, says a label that outlives it; not any more."""
    each = f"docker node update --label-rm swarmmail.{service} $n"
    project.sh("host1", f"for n in $(docker node ls -q); do {each}; done", check=False)


def replaced(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times there"
        return text.replace(old, new)

    return edit


def services(project: Project, manager: str = "host1") -> dict[str, dict[str, Any]]:
    return {raw["Spec"]["Name"]: raw for raw in project.host(manager).docker.services()}


def versions(project: Project) -> dict[str, int]:
    """Every service, config and secret of the Swarm, with the number of its last change."""
    api = project.host("host1").docker
    return {raw["Spec"]["Name"]: raw["Version"]["Index"] for raw in [*api.services(), *api.configs(), *api.secrets()]}


def environment(raw: Mapping[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in raw["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"])


def container(project: Project, host: str, service: str) -> str:
    """The id of the running container of a service; empty when there is none."""
    return project.sh(host, f"docker ps -q --no-trunc -f label=com.docker.swarm.service.name={service}").strip()


def running(project: Project) -> dict[str, tuple[str, str]]:
    """Each service's host and container."""
    return {
        service: (host, found)
        for service in ("mail_mta", "mail_mda")
        for host in HOSTS
        if (found := container(project, host, service))
    }


def volume(project: Project, host: str, name: str) -> str:
    """The folder of a volume on its host; empty when there is none."""
    return project.sh(host, f"docker volume inspect -f '{{{{.Mountpoint}}}}' {name} 2>/dev/null || true").strip()


def marker(project: Project, host: str, name: str) -> dict[str, str]:
    text = project.sh(host, f"cat {volume(project, host, name)}/.swarmmail-volume")
    return dict(line.split("=", 1) for line in text.splitlines())


def mark(project: Project, host: str, name: str, **changes: str) -> None:
    """Write the marker of a volume anew, with changes."""
    values = {**marker(project, host, name), **changes}
    text = "".join(f"{key}={value}\n" for key, value in values.items())
    project.sh(host, f"cat >{volume(project, host, name)}/.swarmmail-volume <<'EOF'\n{text}EOF")


_REMOVE = """
docker service rm $(docker service ls -q) >/dev/null 2>&1
docker config rm $(docker config ls -q) >/dev/null 2>&1
docker secret rm $(docker secret ls -q) >/dev/null 2>&1
for node in $(docker node ls -q); do
  for key in $(docker node inspect -f '{{range $key, $value := .Spec.Labels}}{{$key}} {{end}}' $node); do
    [ $key = swarmmail.host ] || docker node update --label-rm $key $node >/dev/null
  done
done
"""
_EMPTY = """
for i in $(seq 300); do
  [ -z "$(docker ps -aq -f label=com.docker.swarm.service.id)" ] && break
  sleep 0.1
done
docker volume rm -f $(docker volume ls -q) >/dev/null 2>&1
[ -z "$(docker volume ls -q)" ]
"""


def undeploy(project: Project) -> None:
    """Take the stack away as if it had never been there: services, configs, secrets, labels, volumes. Images stay."""
    project.sh("host1", _REMOVE)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: project.sh(host, _EMPTY), HOSTS))


# ---- mail ----


def trusting(project: Project) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(project.root / ".lab" / "ca.crt"))


def smtp(project: Project, host: str = "host1") -> smtplib.SMTP:
    return smtplib.SMTP(project.address(host), 25, local_hostname="stranger.example.com", timeout=20)


@contextlib.contextmanager
def imap(project: Project, address: str, password: str, host: str = "host1") -> Iterator[imaplib.IMAP4]:
    client = imaplib.IMAP4_SSL(project.address(host), 993, ssl_context=trusting(project), timeout=20)
    try:
        client.login(address, password)
        yield client
    finally:
        client.logout()


def send(project: Project, to: str, body: str = "", host: str = "host1") -> str:
    """Send a mail; its token. Raises what smtplib raises."""
    token = secrets.token_hex(12)
    with smtp(project, host) as client:
        client.sendmail(
            "sender@example.com",
            [to],
            f"From: <sender@example.com>\r\nTo: <{to}>\r\nSubject: {token}\r\n\r\n{body}\r\n",
        )
    return token


def mails(project: Project, address: str, password: str, token: str, host: str = "host1") -> list[bytes]:
    """The mails with a token in the inbox, whole."""
    with imap(project, address, password, host) as client:
        client.select("INBOX", readonly=True)
        found = client.search(None, "SUBJECT", token)[1][0].split()
        return [client.fetch(number.decode(), "(RFC822)")[1][0][1] for number in found]  # type: ignore[index,misc]


def arrives(
    project: Project, address: str, password: str, token: str, host: str = "host1", seconds: float = 20
) -> bytes:
    """Wait for a mail; it must come once. A reader who gets no answer meanwhile tries again."""
    found: list[bytes] = []

    def look() -> bool:
        with contextlib.suppress(OSError, imaplib.IMAP4.abort):
            found[:] = mails(project, address, password, token, host)
        return bool(found)

    eventually(look, seconds, f"a mail with {token} in the inbox of {address}")
    assert len(found) == 1
    return found[0]


def queue(project: Project, host: str = "host1", service: str = "mail_mta") -> list[dict[str, Any]]:
    listed = project.sh(host, f"docker exec {container(project, host, service)} postqueue -j")
    return [json.loads(line) for line in listed.splitlines()]


def accounts(project: Project, inventory: str = MAIL) -> list[str]:
    return project.fab("user.list", "--inventory", inventory, check=0).stdout.split()


def account(project: Project, name: str, password: str = PASSWORD, inventory: str = MAIL) -> str:
    """Make an account; its address."""
    address = f"{name}@lab.test"
    project.fab("user.add", address, "--inventory", inventory, stdin=password + "\n", check=0)
    return address
