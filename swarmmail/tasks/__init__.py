"""The doors: what users type. A task parses its arguments, calls one function and prints its result."""

from __future__ import annotations

from invoke import Collection

from swarmmail.tasks import bootstrap, check, lab, mail, migrate, verify

ns = Collection(bootstrap.bootstrap, bootstrap.plan, check.check, mail.deploy, mail.status, verify.verify)
ns.add_task(mail.send_probe, name="probe")
ns.add_collection(migrate.moves)
ns.add_collection(migrate.books)
ns.add_collection(mail.user)
ns.add_collection(mail.queue)
ns.add_collection(bootstrap.lock)
ns.add_collection(Collection.from_module(lab, name="lab"))
