"""Docker's own encryption of an overlay, by the iptables rules that are in force."""

from __future__ import annotations

import pytest

from swarmmail.model import esp

VNI = 4097
# As `iptables -S` prints them (Docker 26.1, kernel 6.12).
BPF = '-m bpf --bytecode "7,32 0 0 4294963252,7 0 0 0,64 0 0 4,116 0 0 8,21 1 0 4097,6 0 0 0,6 0 0 4294967295"'
U32 = '-m u32 --u32 "0x0>>0x16&0x3c@0xc&0xffffff00=0x100100"'


def mark(match: str) -> str:
    return f"-A OUTPUT -p udp -m udp --dport 4789 {match} -j MARK --set-xmark 0xd0c4e3/0xffffffff"


def drop(match: str) -> str:
    return f"-A INPUT -p udp -m policy --dir in --pol none -m udp --dport 4789 {match} -j DROP"


@pytest.mark.parametrize("match", [BPF, U32])
def test_rules_of_a_network_are_known_by_its_vni(match: str) -> None:
    rules = [mark(match), drop(match)]
    assert esp.marked(rules, VNI) and esp.guarded(rules, VNI)
    for other in (VNI + 1, VNI >> 4, VNI << 4, 6, 64):
        assert not esp.marked(rules, other) and not esp.guarded(rules, other)


@pytest.mark.parametrize("match", [BPF, U32])
def test_one_does_not_stand_for_the_other(match: str) -> None:
    assert not esp.guarded([mark(match)], VNI)
    assert not esp.marked([drop(match)], VNI)
    assert not esp.guarded([drop(match).replace("-m policy --dir in --pol none ", "")], VNI)
    assert not esp.marked([], VNI)
