"""``swarmmail bootstrap deploy``: the same program as ``fab bootstrap deploy``, for an installed package."""

from __future__ import annotations

import gc
import sys
from importlib.metadata import version
from typing import Any

import fabric.executor
from fabric.main import Fab


def tasks() -> Any:
    """All tasks. Their modules make many objects that stay to the end: Python's collector need not look at them while
    they come to be, nor at the exit (together 0.1 s on a machine of two cores)."""
    gc.disable()
    try:
        from swarmmail.tasks import ns
    finally:
        gc.freeze()
        gc.enable()
    return ns


def program() -> Any:
    return Fab(
        name="swarmmail",
        binary="swarmmail",
        version=version("swarmmail"),
        namespace=tasks(),
        executor_class=fabric.executor.Executor,
        config_class=fabric.Config,
    )


def main() -> None:
    sys.exit(program().run())
