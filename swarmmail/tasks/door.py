"""What every task needs: errors as lines, one inventory, one fleet of connections for the whole command."""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import fabric
from invoke.exceptions import Exit

from swarmmail import report
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import inventory as model
from swarmmail.model.errors import InputError, SwarmmailError

HELP = {
    "inventory": "inventory file, or its name in inventories/ (else SWARMMAIL_INVENTORY, fabric.yml, the only one)",
    "plan": "only show what would be done",
    "json": "one JSON document on standard output",
    "strict": "exit status 1 when there are warnings",
    "smtp": "a mail server of somebody's, to try port 25 at",
    "no_probe": "leave the test mail at the end out",
    "service": "service of the stack, by its name or role",
    "to": "host of the inventory",
    "check_only": "only look whether it can be done",
    "times": "print the seconds of each step",
    "source_is_dead": "the source is lost: an older copy on the target becomes the live one",
    "yes": "I know what it costs",
    "rate": "mails a second",
    "seconds": "how long",
    "bwlimit": "limit of the copy, as rsync's: KiB/s, or with a unit (20m); 0 is none",
    "no_check": "leave the look at the hosts before the first change out",
    "no_verify": "leave the proof of encryption at the end out",
    "keep_pcap": "folder for the packets that were judged",
    "watch": "verify again and again, each time after so long: 90s, 30m, 12h",
    "address": "mail address of the account",
    "mail": "remove the mailbox too",
    "hosts": "number of hosts",
    "host": "a host of the lab",
    "between": "two hosts of the lab, as in host1,host2",
    "only": "packets that are lost: all, esp, icmp, tcp, udp or vxlan",
    "one_way": "only what the first host sends is lost",
    "by": "how far ahead: 90s, 30m, 2h",
    "forbid": "modules of the kernel, as in esp4,gcm",
    "state": "off, on or reset",
    "bare": "number of further hosts without Docker",
    "driver": "what makes the hosts: container, or vm",
    "images": "remove the lab's images too, which are kept as a cache",
}
"""What an option means; the same name means the same everywhere."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
F = TypeVar("F", bound=Callable[..., Any])

_fleets: dict[Path, Fleet] = {}


def door(function: F) -> Any:
    """Make a task of a function: an error becomes one line on standard error and exit status 1.

    ``SWARMMAIL_DEBUG=1`` shows the traceback too.
    """

    @functools.wraps(function)
    def wrapper(c: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(c, fabric.Connection):
            raise Exit("swarmmail: -H does not apply here: the inventory says which hosts (see --inventory)", 2)
        try:
            return function(c, *args, **kwargs)
        except SwarmmailError as error:
            if os.environ.get("SWARMMAIL_DEBUG"):
                import traceback

                traceback.print_exc()
            report.error(str(error))
            raise Exit(code=error.exit_code) from None
        except Exit:
            raise
        except KeyboardInterrupt:
            report.error("interrupted; run the same command again: it goes on from here")
            raise Exit(code=130) from None
        except Exception as error:
            if os.environ.get("SWARMMAIL_DEBUG"):
                raise
            report.error(
                f"this should not happen: {type(error).__name__}: {error} -> run again with SWARMMAIL_DEBUG=1 "
                "and send what it prints"
            )
            raise Exit(code=70) from None

    options = inspect.signature(function).parameters
    return cast(Any, fabric.task(wrapper, help={name: text for name, text in HELP.items() if name in options}))


def project() -> Path:
    """The project folder, relative to here: the nearest one upwards with a fabfile, as ``fab`` itself looks for it."""
    here = Path.cwd()
    found = next((folder for folder in (here, *here.parents) if (folder / "fabfile.py").exists()), here)
    return Path(os.path.relpath(found))


def load(c: Any, inventory: str | None) -> model.Inventory:
    """The inventory that this command is about. Raises InputError with all its problems."""
    configured = None
    if "swarmmail" in c.config:
        configured = c.config.swarmmail.get("inventory")
    path = model.choose_inventory(inventory, os.environ, configured, project())
    loaded = model.load(path)
    if problems := model.check_files(loaded):
        raise InputError(problems)
    return loaded


def fleet(c: Any, inventory: str | None) -> Fleet:
    """The hosts of the inventory; connections are shared by all tasks of one command."""
    loaded = load(c, inventory)
    if loaded.path not in _fleets:
        password = c.config.sudo.password if "sudo" in c.config else None
        _fleets[loaded.path] = Fleet(loaded, password)
        atexit.register(_fleets[loaded.path].close)
    return _fleets[loaded.path]


def dry(c: Any, plan: bool) -> bool:
    """Only show what would be done: ``--plan``, or Fabric's own ``--dry``."""
    return plan or bool(c.config.run.dry)


def duration(option: str, text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``12h``, ``1d``. Raises InputError."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isascii() or not number.isdigit() or int(number) == 0:
        raise InputError([f"--{option} {text}: allowed: a whole number of s, m, h or d, as in 12h -> --{option} 12h"])
    return float(number) * _UNITS[unit]


def status(code: int) -> None:
    """End the command with an exit status that is not an error's."""
    sys.stdout.flush()
    raise Exit(code=code)
