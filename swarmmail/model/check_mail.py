"""``fab check``: what mail needs of the world: names that agree, and a way out. Pure; the asking is done elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from swarmmail.model.check import Findings, Measured
from swarmmail.model.findings import note, ok, warning

RESERVED = ("test", "example", "invalid", "localhost", "local", "internal", "example.com", "example.net", "example.org")
"""RFC 2606, 6761, 6762: no DNS outside knows these."""


@dataclass(frozen=True)
class Names:
    """What the stack calls itself, and the host of its MTA."""

    hostname: str
    domain: str
    host: str
    address: str


@dataclass(frozen=True)
class Answers:
    """DNS as this machine sees it; None: could not be asked."""

    addresses: frozenset[str] | None = None
    pointer: str | None = None
    mx: tuple[str, ...] | None = None


def names(m: Measured) -> Names | None:
    """None when the inventory does not say."""
    stack = m.inventory.stack
    if stack is None:
        return None
    hostname, domain = (
        str(stack.settings.get(key, "")).rstrip(".").lower() for key in ("MAIL_HOSTNAME", "MAIL_DOMAIN")
    )
    mta = next((p for p in m.published if 25 in p.ports and p.host), None)
    if not hostname or mta is None or mta.host not in m.inventory.hosts:
        return None
    return Names(hostname, domain, str(mta.host), m.address(str(mta.host)))


def is_reserved(name: str) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in RESERVED)


def findings(m: Measured, answers: Answers | None, smtp: Mapping[str, str]) -> Findings:
    """``answers`` None: nothing was asked. ``smtp``: host to what port 25 of a server said, if one was named."""
    found = names(m)
    if found is not None:
        if answers is None:
            yield note(
                found.host, "mail names", f"{found.hostname}: DNS was not asked", "a reserved name, nobody knows it"
            )
        else:
            yield from _agree(found, answers)
    for host, answer in smtp.items():
        if answer.startswith("220"):
            yield ok(host, "outbound port 25", answer[:80])
        else:
            yield note(
                host, "outbound port 25", answer[:120],
                "many providers block it: mail to others then needs a relay, or a request to the provider",
            )  # fmt: skip
    if m.inventory.stack is not None and not smtp:
        yield note(
            "inventory", "outbound port 25", "not tried", "fab check --smtp MX.OF.SOMEBODY tries it from every host"
        )


def _agree(found: Names, answers: Answers) -> Findings:
    seen = answers.addresses
    private = not ip_address(found.address).is_global
    if seen is None:
        yield note(found.host, "mail names", f"{found.hostname}: DNS does not answer here")
    elif not seen:
        yield warning(
            found.host, "mail names", f"{found.hostname} has no address", "no mail server finds it",
            f"publish {found.hostname} A {found.address} in the DNS of its domain", "",
        )  # fmt: skip
    elif found.address in seen:
        yield ok(found.host, "mail names", f"{found.hostname} is {found.address}")
    elif private:
        yield note(
            found.host, "mail names", f"{found.hostname} is {', '.join(sorted(seen))}, the host has {found.address}",
            "right when a router passes port 25 on",
        )  # fmt: skip
    else:
        yield warning(
            found.host, "mail names",
            f"{found.hostname} is {', '.join(sorted(seen))}, but the MTA begins on {found.address}",
            "mail goes to another machine", f"publish {found.hostname} A {found.address} in the DNS of its domain", "",
        )  # fmt: skip
    if answers.pointer is not None and not private:
        if answers.pointer.rstrip(".").lower() == found.hostname:
            yield ok(found.host, "reverse name", answers.pointer)
        else:
            yield warning(
                found.host, "reverse name", f"{found.address} is {answers.pointer or 'nobody'}, not {found.hostname}",
                "many servers refuse mail from there",
                f"ask the provider to set the PTR of {found.address} to {found.hostname}", "",
            )  # fmt: skip
    if answers.mx is not None and found.domain:
        if found.hostname in answers.mx:
            yield ok(found.host, "MX", f"{found.domain}: {', '.join(answers.mx)}")
        else:
            yield warning(
                found.host, "MX", f"{found.domain} has {', '.join(answers.mx) or 'none'}, not {found.hostname}",
                "mail for the domain goes elsewhere", f"publish {found.domain} MX 10 {found.hostname}.", "",
            )  # fmt: skip
