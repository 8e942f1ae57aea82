"""Deadlines times the operator's patience."""

from __future__ import annotations

import pytest

from swarmmail.model import patience


@pytest.mark.parametrize(
    ("text", "factor"), [("", 1), ("1", 1), ("2.5", 2.5), ("0", 1), ("-3", 1), ("1e9", 100), ("nan", 1), ("much", 1)]
)
def test_it_never_shortens_and_never_ends_a_task(text: str, factor: float) -> None:
    assert patience._factor(text) == factor
