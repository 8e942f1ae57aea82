"""``swarmmail bootstrap deploy``: the same program as ``fab bootstrap deploy``, for an installed package."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import fabric.executor
from fabric.main import Fab


def program() -> Any:
    from swarmmail.tasks import ns

    return Fab(
        name="swarmmail",
        binary="swarmmail",
        version=version("swarmmail"),
        namespace=ns,
        executor_class=fabric.executor.Executor,
        config_class=fabric.Config,
    )


def main() -> None:
    sys.exit(program().run())
