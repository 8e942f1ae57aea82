"""Virtual hosts: what they are started with, and the faults that can be made. No machine is started."""

from __future__ import annotations

import pytest

from swarmmail.lab import faults, vmimage
from swarmmail.lab.faults import Cut
from swarmmail.model.errors import InputError

ADDRESSES = {"host1": "198.18.0.11", "host2": "198.18.0.12"}


def test_the_recipe_decides_and_nothing_else() -> None:
    assert set(vmimage.recipe()) == {
        "vm/build",
        "vm/init",
        "vm/lab-accounts.service",
        "image/sshd.conf",
        "image/lab-accounts",
    }


def test_what_a_cut_takes_away() -> None:
    assert faults.cuts("host2", (), "all", False) == [Cut("host2", ""), Cut("", "host2")]
    assert faults.cuts("", ("host1", "host2"), "esp", True) == [Cut("host1", "host2", "esp")]
    assert Cut("host1", "host2", "esp").rule(ADDRESSES) == (
        'ip saddr 198.18.0.11 ip daddr 198.18.0.12 ip protocol esp counter drop comment "host1 to host2: esp"'
    )
    assert Cut("", "host2").rule(ADDRESSES) == 'ip daddr 198.18.0.12 counter drop comment "all to host2: all"'


@pytest.mark.parametrize(
    ("host", "between", "only", "said"),
    [
        ("", (), "all", "name --host HOST, or --between HOST,HOST"),
        ("host1", ("host1", "host2"), "all", "name --host HOST, or --between"),
        ("", ("host1",), "all", "--between: found 'host1', allowed: two hosts"),
        ("", ("host1", "host1"), "all", "allowed: two hosts"),
        ("host1", (), "gre", "--only: found 'gre', allowed: all, esp, icmp, tcp, udp, vxlan"),
    ],
)
def test_what_cannot_be_cut_is_said(host: str, between: tuple[str, ...], only: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        faults.cuts(host, between, only, False)
