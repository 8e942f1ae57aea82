"""The doors: what users type. A task parses its arguments, calls one function and prints its result."""

from __future__ import annotations

from invoke import Collection

from swarmmail.tasks import bootstrap, lab

ns = Collection(bootstrap.bootstrap)
ns.add_collection(Collection.from_module(lab, name="lab"))
