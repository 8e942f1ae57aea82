"""Gather a host's facts in one round trip."""

from __future__ import annotations

from importlib import resources

from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import facts
from swarmmail.model.errors import HostError
from swarmmail.model.patience import patient

_SCRIPT = resources.files(__package__).joinpath("facts.sh").read_text().replace("@ANSWER@", f"{patient(25):g}")


def gather(host: Host) -> facts.HostFacts:
    """Raises HostError or Unreachable."""
    result = host.run("sh -s", stdin=_SCRIPT, step="gather facts", timeout=60, check=False)
    if "\n@@end" not in result.stdout:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"the facts are incomplete ({last})", host=host.name, step="gather facts")
    return facts.parse(host.name, result.stdout)


def gather_all(fleet: Fleet, strict: bool = True) -> dict[str, facts.HostFacts]:
    """All hosts at once. ``strict``: one error that names every host that could not be read; else such a host
    has facts that say why (``unreachable``)."""

    def lenient(host: Host) -> facts.HostFacts:
        try:
            return gather(host)
        except HostError as error:
            return facts.HostFacts(host.name, unreachable=error.what)

    return fleet.each(gather if strict else lenient)
