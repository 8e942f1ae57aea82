"""The preflight."""

from __future__ import annotations

from typing import Any

from swarmmail import report
from swarmmail.cluster import check as preflight
from swarmmail.model import findings
from swarmmail.model.findings import Level
from swarmmail.tasks import door as doors
from swarmmail.tasks.door import door, fleet


@door
def check(
    c: Any, inventory: str | None = None, strict: bool = False, json: bool = False, smtp: str | None = None
) -> None:
    """Look at the hosts and between each two of them, before anything is changed. Changes nothing that stays.

    Each finding says what was measured, why it matters, and the command that mends it. Exit status 0; 1 with
    --strict when there are warnings; 2 when there are errors. --smtp HOST also tries port 25 at that server.
    """
    report.quiet(json)
    found = preflight.run(fleet(c, inventory), smtp)
    report.quiet(False)
    status = findings.status(found, strict)
    if json:
        report.document(findings.document(found, strict))
    else:
        preflight.show(found)
        errors, warnings = (findings.count(found, level) for level in (Level.ERROR, Level.WARNING))
        text = f"check: {errors} errors, {warnings} warnings" if errors or warnings else "check: nothing is in the way"
        report.result(text, good=status == 0)
    if status:
        doors.status(status)
