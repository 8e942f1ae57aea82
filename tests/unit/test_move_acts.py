"""What ``move.acts`` makes of what a pass of the copy says, without a host."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from swarmmail.hosts.connection import Result
from swarmmail.model.errors import HostError, Refused
from swarmmail.model.move import Move
from swarmmail.move import acts
from swarmmail.move.acts import LAST_PASS, LINKS_PASS, LIVE_PASS, HostActs

GOOD = Result(0, "began 1000\nNumber of regular files transferred: 3\nTotal transferred file size: 4,000 bytes\n", "")
BROKEN = Result(12, "began 1000\n", "rsync: connection unexpectedly closed")
GONE = Result(24, GOOD.stdout, 'file has vanished: "x"')
FULL = Result(23, "began 1000\n", "No space left on device")
ENDED = Result(20, "began 1000\n", "rsync error: received SIGINT, SIGTERM, or SIGHUP (code 20)")
MOVE = Move("id1", "mda", "mda", "host3", "host2", "n3", "n2", ("mail_mail",), 2, 0.0)


class Copying:
    """Stands for both hosts. ``passes``: what each says, or how long it stands still if nobody ends it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *passes: Result | float) -> None:
        self.passes = list(passes)
        self.words: list[tuple[object, ...]] = []
        self.ended: list[str] = []
        self.connected = 0
        self._end = threading.Event()
        monkeypatch.setattr(acts, "verb", self.verb)
        monkeypatch.setattr(acts, "LOOK", 0.01)
        monkeypatch.setattr(acts, "STANDSTILL", 0.05)
        monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
        self.acts = HostActs.__new__(HostActs)
        self.acts.__dict__ |= {
            "move": MOVE,
            "source": SimpleNamespace(name="host3"),
            "target": SimpleNamespace(name="host2"),
            "hooks": SimpleNamespace(live_copy=True),
            "passes": (),
            "bwlimit": "0",
            "_paths": {"host3": ("/v",), "host2": ("/v",)},
            "_where": "root@host2",
            "_copied": 0,
            "_copying_since": 0,
            "_linked": 0,
            "_connected": self.connect,
        }

    def connect(self) -> None:
        self.connected += 1

    def verb(self, host: Any, name: str, *words: object, **_: object) -> Result:
        if name == "end":
            self.ended.append(host.name)
            if len(self.ended) % 2 == 0:
                self._end.set()
        if name == "pass":
            self.words.append(words)
            said = self.passes.pop(0)
            if isinstance(said, Result):
                return said
            self._end.clear()
            return ENDED if self._end.wait(said) else GOOD
        return Result(0, "1 1\n", "")


def test_a_pass_that_stands_still_is_ended_on_both_sides_and_made_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    copying = Copying(monkeypatch, 20.0, GOOD)
    done = copying.acts._pass("copy", LIVE_PASS)
    assert (done.files, done.bytes) == (3, 4000)
    assert copying.ended == ["host3", "host2"] and copying.connected == 1 and not copying.passes


def test_a_pass_that_comes_to_its_end_by_itself_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes between two passes, either, while the connection is made anew."""
    copying = Copying(monkeypatch, BROKEN, GOOD)
    slow = threading.Event()
    monkeypatch.setattr(copying.acts, "_connected", lambda: slow.wait(0.3))
    copying.acts._pass("copy", LIVE_PASS)
    slow.wait(0.2)
    assert copying.ended == []


def test_while_the_service_is_away_a_copy_may_stand_still_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    copying = Copying(monkeypatch, 20.0, 20.0, GOOD)
    with pytest.raises(HostError, match=r"the copy failed: it stood still for 0\.05 s"):
        copying.acts._pass("last copy", LAST_PASS)
    assert copying.passes == [GOOD]
    copying = Copying(monkeypatch, *[20.0] * 4, GOOD)
    assert copying.acts._pass("copy", LIVE_PASS).files == 3


@pytest.mark.parametrize(
    ("mode", "said", "fails"),
    [
        (LIVE_PASS, GONE, False),
        (LINKS_PASS, GONE, False),
        (LAST_PASS, GONE, True),
        (LIVE_PASS, FULL, True),
        (LINKS_PASS, Result(2, "", "Invalid packet"), True),
    ],
)
def test_what_may_vanish(monkeypatch: pytest.MonkeyPatch, mode: str, said: Result, fails: bool) -> None:
    copying = Copying(monkeypatch, said)
    if not fails:
        copying.acts._pass("copy", mode)
    else:
        with pytest.raises(HostError, match="the copy failed: "):
            copying.acts._pass("copy", mode)


def test_hard_links_come_after_the_passes_and_the_last_one_makes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    copying = Copying(monkeypatch, GOOD, Result(0, "began 2000\n", ""), Result(0, "began 3000\n", ""), GOOD)
    copying.acts.precopy()
    assert copying.acts._copied == 1000, "no pass over all since then"
    copying.acts._pass("copy", LIVE_PASS)
    copying.acts._pass("last copy", LAST_PASS, copying.acts._copied - acts.MARGIN)
    assert [words[1:4] for words in copying.words] == [
        (LIVE_PASS, 0, 0),
        (LINKS_PASS, 998, 0),
        (LIVE_PASS, 0, 998),
        (LAST_PASS, 2998, 998),
    ]


def test_hard_links_that_fail_are_left_for_the_last_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copying = Copying(monkeypatch, GOOD, Result(2, "began 2000\n", "Invalid packet at end of run"))
    copying.acts.precopy()
    assert (copying.acts._copied, copying.acts._linked) == (1000, 0)
    assert "hard links are left for the last pass: the copy failed: Invalid packet" in capsys.readouterr().err
    copying = Copying(monkeypatch, GOOD)
    monkeypatch.setattr(copying.acts, "_pass", _overtaken)
    with pytest.raises(Refused):
        copying.acts.precopy()


def _overtaken(*_: object) -> None:
    raise Refused("this move was ended by somebody else", step="copy")
