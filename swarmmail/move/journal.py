"""The journal of a move: a Swarm config. Its content is the move; labels, all that may change, are phase and writer.

Every change names the version it is based on, so of two runs that both believe to be at work only one goes on.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
from typing import Any

import docker.errors

from swarmmail.hosts.connection import Host
from swarmmail.hosts.dockerapi import patiently, update
from swarmmail.model.errors import Locked, Refused
from swarmmail.model.move import JOURNAL as NAME
from swarmmail.model.move import Move, Overtaken, Phase, decode

PHASE_LABEL = "swarmmail.phase"
WRITER_LABEL = "swarmmail.writer"
"""Which run wrote the phase: one whose answer was lost in an election knows its own word again."""


class Journal:
    """The one journal of the Swarm. See ``model.move.Journal``."""

    def __init__(self, manager: Host, raw: dict[str, Any]) -> None:
        self.manager = manager
        self._raw = raw
        self._me = secrets.token_hex(8)
        self.move: Move = decode(base64.b64decode(raw["Spec"].get("Data", "")))

    @property
    def phase(self) -> Phase:
        text = (self._raw["Spec"].get("Labels") or {}).get(PHASE_LABEL, "")
        try:
            return Phase(text)
        except ValueError:
            raise Refused(
                f"the journal names an unknown phase '{text}'",
                step="read the journal",
                hint="it is of another version of swarmmail",
            ) from None

    @property
    def place(self) -> str:
        """The host that the service is on."""
        return self.move.target if self.phase.is_forward_only else self.move.source

    def advance(self, phase: Phase) -> None:
        """Raises Overtaken when somebody else wrote in between."""
        spec = dict(self._raw["Spec"])
        mine = {PHASE_LABEL: phase.value, WRITER_LABEL: self._me}
        spec["Labels"] = {**(spec.get("Labels") or {}), **mine}
        api, name = self.manager.docker, self._raw["ID"]

        def write() -> dict[str, Any]:
            with self.manager.doing("write the journal"):
                try:
                    update(api, "configs", self._raw, spec)
                except (docker.errors.NotFound, docker.errors.APIError) as error:
                    text = str(error.explanation or error)
                    if isinstance(error, docker.errors.NotFound) or "not found" in text:
                        raise _overtaken(phase) from None
                    if "out of sequence" not in text:
                        raise
                raw: dict[str, Any] = api.inspect_config(name)
                if not mine.items() <= raw["Spec"]["Labels"].items():
                    raise _overtaken(phase)  # somebody else wrote, before our word or right after it
                return raw

        self._raw = patiently(write)

    def remove(self) -> None:
        def once() -> None:
            with self.manager.doing("remove the journal"), contextlib.suppress(docker.errors.NotFound):
                self.manager.docker.remove_config(self._raw["ID"])

        patiently(once)


def _overtaken(phase: Phase) -> Overtaken:
    return Overtaken(
        f"the journal of this move was changed by somebody else (wanted to write '{phase}')",
        step="migrate",
        hint="see where it stands: fab migrate.status; then: fab migrate.resume",
    )


def read(manager: Host) -> Journal | None:
    """The journal of a move that has not ended; None when there is none."""
    with manager.doing("read the journal"):
        found = [c for c in manager.docker.configs(filters={"name": NAME}) if c["Spec"]["Name"] == NAME]
    return Journal(manager, found[0]) if found else None


def begin(manager: Host, move: Move, phase: Phase = Phase.COPY) -> Journal:
    """Raises Locked when there is one already."""
    with manager.doing("begin the journal"):
        try:
            manager.docker.create_config(NAME, move.encode(), labels={PHASE_LABEL: phase.value})
        except docker.errors.APIError as error:
            if "already exists" not in str(error):
                raise
            raise Locked("another move has just begun", step="migrate", hint="see: fab migrate.status") from None
    journal = read(manager)
    if journal is None or journal.move.id != move.id:
        raise Locked("another move has just begun", step="migrate", hint="see: fab migrate.status")
    return journal
