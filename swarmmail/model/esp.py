"""Docker's own encryption of an overlay: the iptables rules that send its packets through IPsec. Pure.

Docker marks outgoing VXLAN of an encrypted network, so that a policy encrypts it, and drops incoming VXLAN of it that
did not come by ESP (moby, libnetwork/drivers/overlay/encryption.go). Without the first, packets leave in clear; without
the second, they are taken. Both select the network by the VXLAN header, with xt_bpf or xt_u32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def marked(rules: Iterable[str], vni: int) -> bool:
    """Whether outgoing packets of a network go through IPsec. ``rules``: as ``iptables -S`` prints them."""
    return any("-j MARK" in rule and _selects(rule, vni) for rule in rules)


def guarded(rules: Iterable[str], vni: int) -> bool:
    """Whether packets of a network that came in clear are dropped."""
    return any("--pol none" in rule and "-j DROP" in rule and _selects(rule, vni) for rule in rules)


def peers(lines: Iterable[str]) -> frozenset[str]:
    """The addresses that ESP goes to and comes from: a policy for VXLAN, and states both ways. ``lines``: those of
    ``ip xfrm policy`` and ``ip xfrm state`` that begin an entry (ip-xfrm(8))."""
    policies, targets, sources = set(), set(), set()
    for line in lines:
        found = re.match(r"src (\S+) dst (\S+)(.*)", line)
        if found is None:
            continue
        source, target, rest = found.groups()
        if "/" not in target:
            sources.add(source)
            targets.add(target)
        elif "dport 4789" in rest:
            policies.add(target.partition("/")[0])
    return frozenset(policies & targets & sources)


def _selects(rule: str, vni: int) -> bool:
    """By xt_bpf: the program compares (21, BPF_JEQ of a constant) with the VNI. By xt_u32: with the word that has the
    VNI in its upper 24 bits, in hexadecimal."""
    return re.search(rf"\b21 \d+ \d+ {vni},|={vni << 8:#x}\b", rule) is not None
