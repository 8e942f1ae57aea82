"""The acts of a move of a service without data: it answers on the target before it ends on the source."""

from __future__ import annotations

import contextlib

from swarmmail.cluster import images, swarm
from swarmmail.hosts.connection import Host
from swarmmail.model.errors import HostError, Refused
from swarmmail.model.swarm import PLACED
from swarmmail.move.acts import HostActs


class BoundActs(HostActs):
    """See ``model.move.Acts``. Nothing is needed of the source: it may be lost."""

    def prepare(self) -> None:
        try:
            if self._image():
                return
        except HostError as error:
            if error.host != self.source.name:
                raise
        assert self.fleet.inventory.stack is not None
        where, tag = images.builder(self.fleet, self.fleet.inventory.stack.build), self._tag()
        if not self._bring(where, tag):
            raise Refused(
                f"image {tag} is neither to be had from {self.source.name} nor on {where.name}",
                host=self.target.name,
                step="prepare",
                hint=f"on {where.name}: docker build -t {tag} {self.service.build or 'FOLDER'}",
            )

    def standby(self) -> None:
        try:
            self.serve()
        except HostError as error:
            what = f"{error.what}; it stays on {self.source.name}"
            raise HostError(what, host=error.host, step="standby", hint=error.hint) from None

    def serve(self) -> None:
        """Once more: a run that finishes what another one began does not know."""
        self.hooks.answers(self.target, self._up())

    def tidy(self) -> None:
        self._label(self.move.target_node, PLACED)  # a hand may have taken it
        self._end_on(self.source, self.move.source_node)

    def revive(self) -> None:
        """It was not stopped there; but a hand may have taken its label."""
        self._label(self.move.source_node, PLACED)

    def retreat(self) -> None:
        self._end_on(self.target, self.move.target_node)

    def give_up(self, lost: Host) -> None:
        """It is on the source again, or still."""
        self.revive()
        self.retreat()

    def _label(self, node: str, value: str | None) -> None:
        swarm.set_label(self.manager, node, self.service.place_label, value)

    def _end_on(self, host: Host, node: str) -> None:
        self._label(node, None)
        with contextlib.suppress(HostError):  # a host that is away: the Swarm tells it when it is back
            self._ended(host)
