"""Docker engines that are known to be bad for an encrypted overlay, with reason and source. As of 2026-11-25."""

from __future__ import annotations

import re
from dataclasses import dataclass

AS_OF = "2026-11-25"
OLDEST_API = (1, 41)
"""What the Docker SDK is first spoken with (``hosts/dockerapi.py``)."""
Version = tuple[int, int, int]


@dataclass(frozen=True)
class Bad:
    """``ranges``: first bad version, first good one after it. ``where``: ``ipsec`` (matters when Docker itself
    encrypts), ``firewalld`` (the same, with such a firewall), or ``all``. ``level``: a finding's, where it matters."""

    advisory: str
    date: str
    ranges: tuple[tuple[Version, Version], ...]
    where: str
    level: str
    reason: str


KNOWN_BAD = (
    Bad(
        "CVE-2023-28841 (GHSA-33pg-m6jh-5237)",
        "2023-04-04",
        (((1, 12, 0), (20, 10, 24)), ((23, 0, 0), (23, 0, 3))),
        "ipsec",
        "error",
        "where the kernel lacks a match module, an encrypted overlay sends clear text and reports nothing",
    ),
    Bad(
        "CVE-2023-28840 (GHSA-232p-vwff-86mp)",
        "2023-04-04",
        (((1, 12, 0), (20, 10, 24)), ((23, 0, 0), (23, 0, 3))),
        "ipsec",
        "error",
        "an encrypted overlay may take forged clear datagrams",
    ),
    Bad(
        "CVE-2023-28842 (GHSA-6wrf-mxfj-pf5p)",
        "2023-04-04",
        (((1, 12, 0), (20, 10, 24)), ((23, 0, 0), (23, 0, 3))),
        "ipsec",
        "error",
        "an encrypted overlay with one node is not protected",
    ),
    Bad(
        "CVE-2026-92542 (GHSA-6m9p-4h64-m6vh)",
        "2026-10-07",
        (((0, 0, 0), (25, 0, 19)), ((26, 0, 0), (29, 8, 2))),
        "ipsec",
        "warning",
        "an unprivileged process on a node can have its forged VXLAN datagrams encrypted as the overlay's own",
    ),
    Bad(
        "CVE-2026-115538",
        "2026-11-10",
        (((0, 0, 0), (29, 9, 3)),),
        "firewalld",
        "error",
        "this firewalld deletes other programs' iptables rules, those of the encryption among them",
    ),
    Bad(
        "moby#50129",
        "2025-06-02",
        (((28, 2, 0), (28, 3, 0)),),
        "all",
        "warning",
        "names of services vanish from the Swarm's DNS (reported for 28.2.2; what caused it was taken out in 28.3.0)",
    ),
    Bad(
        "moby#53141",
        "2026-07-22",
        (((29, 0, 0), (29, 6, 3)),),
        "all",
        "warning",
        "after 10 to 30 s without network a node's services have no name any more, for hours (reported for 29.0 to "
        "29.6.2; mended by moby#53142)",
    ),
    Bad(
        "moby#51614",
        "2025-11-28",
        (((29, 1, 0), (29, 1, 1)),),
        "all",
        "warning",
        "containers get no answer from Docker's DNS",
    ),
)


def version(text: str) -> Version | None:
    """``26.1.5+dfsg1`` is (26, 1, 5); None when there is no version in it."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def known_bad(text: str) -> list[Bad]:
    """The entries that this version falls under, by its number alone: distributions mend without a new number."""
    found = version(text)
    return [bad for bad in KNOWN_BAD if found and any(first <= found < good for first, good in bad.ranges)]
