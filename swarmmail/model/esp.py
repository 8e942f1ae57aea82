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


def _selects(rule: str, vni: int) -> bool:
    """By xt_bpf: the program compares (21, BPF_JEQ of a constant) with the VNI. By xt_u32: with the word that has the
    VNI in its upper 24 bits, in hexadecimal."""
    return re.search(rf"\b21 \d+ \d+ {vni},|={vni << 8:#x}\b", rule) is not None
