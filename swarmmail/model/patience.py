"""Deadlines for hosts that are slower than most: emulated ones, or busy ones at the end of a thin line."""

from __future__ import annotations

import os


def _factor(text: str) -> float:
    try:
        return max(1.0, min(float(text), 100.0))  # in this order, not-a-number counts as 1
    except ValueError:
        return 1.0


FACTOR = _factor(os.environ.get("SWARMMAIL_PATIENCE", ""))


def patient(seconds: float) -> float:
    """A deadline in seconds, times ``SWARMMAIL_PATIENCE`` (1 to 100, default 1). What is quick stays quick."""
    return seconds * FACTOR
