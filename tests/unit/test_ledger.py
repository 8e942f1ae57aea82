"""The ledger's counts, against what was really done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmmail.model.ledger import GONE, Actions, Ledger

FATES = {
    # what the sender heard, copies found, in a queue -> the one count that it belongs to
    ("ok", 1, False): "delivered",
    ("ok", 0, False): "lost",
    ("ok", 0, True): "queued",
    ("ok", 2, False): "delivered",
    ("ok", 1, True): "delivered",
    ("no answer", 0, False): "",
    ("no answer", 1, False): "recovered",
    ("no answer", 0, True): "",
    ("refused", 0, False): "",
    ("refused", 1, False): "unexpected",
    ("never sent", 1, False): "unexpected",
}


@given(st.lists(st.sampled_from(sorted(FATES))))
def test_each_mail_is_counted_once_and_where_it_belongs(fates: list[tuple[str, int, bool]]) -> None:
    ledger, found, queued = Ledger(), [], []
    for number, (heard, copies, waiting) in enumerate(fates):
        token = f"m{number}"
        if heard != "never sent":
            ledger.attempt(token, 1)
        if heard == "ok":
            ledger.acknowledge(token, 2)
        if heard == "refused":
            ledger.refuse(token)
        found += [token] * copies
        queued += [token] * waiting
    verdict = ledger.judge(found, queued)
    belongs = [FATES[fate] for fate in fates]
    assert verdict.delivered == belongs.count("delivered")
    assert len(verdict.lost) == belongs.count("lost")
    assert verdict.queued == belongs.count("queued")
    assert len(verdict.unexpected) == belongs.count("unexpected")
    assert verdict.recovered == belongs.count("recovered")
    assert verdict.duplicated == sum(copies == 2 for _, copies, _ in fates)
    assert verdict.is_clean == (not {"lost", "unexpected"} & set(belongs))
    assert verdict.attempted == sum(heard != "never sent" for heard, _, _ in fates)


def test_the_longest_delay_counts_from_the_acknowledgement() -> None:
    ledger = Ledger()
    ledger.attempt("a", 1.0)
    ledger.acknowledge("a", 2.0)
    ledger.attempt("b", 1.0)
    verdict = ledger.judge(["a", "b"], arrived={"a": 5.5, "b": 99, "stranger": 99})
    assert verdict.longest == 3.5 and "longest delay 3.50 s" in str(verdict)


def test_a_token_is_used_once() -> None:
    ledger = Ledger()
    ledger.attempt("a", 1)
    with pytest.raises(ValueError, match="sent before"):
        ledger.attempt("a", 2)


@pytest.mark.parametrize(
    ("answered", "copies", "good"),
    [
        (True, ["Kept"], True),
        (True, ["INBOX"], False),
        (True, [], False),
        (True, ["Kept", "Kept"], False),
        (False, ["Kept"], True),
        (False, ["INBOX"], True),
        (False, ["INBOX", "Kept"], True),
        (False, [], False),
        (False, ["Else"], False),
    ],
)
def test_an_acknowledged_action_is_kept_and_another_may_have_been_done(
    answered: bool, copies: list[str], good: bool
) -> None:
    actions = Actions()
    actions.attempt("a", "INBOX")
    actions.acknowledge("a", "INBOX")
    actions.attempt("a", "Kept")
    if answered:
        actions.acknowledge("a", "Kept")
    assert (actions.judge({"a": copies}) == ()) == good


def test_a_removed_message_stays_away_and_none_comes_from_nowhere() -> None:
    actions = Actions()
    actions.attempt("a", "INBOX")
    actions.acknowledge("a", "INBOX")
    actions.attempt("a", GONE)
    actions.acknowledge("a", GONE)
    assert actions.judge({}) == ()
    assert actions.judge({"a": ["INBOX"]}) == ("a is INBOX, was left gone",)
    assert actions.judge({"b": ["INBOX"]}) == ("b was made by nobody",)
