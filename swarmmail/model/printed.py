"""What our scripts print on a host, read: sections that begin with ``@@name``, and JSON inside of them.

What is missing or can't be read counts as empty: a host may lack any program that a script calls.
"""

from __future__ import annotations

import json
from typing import Any


def sections(text: str) -> dict[str, str]:
    """Section to the lines below its head, unstripped."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.startswith("@@"):
            current = found.setdefault(line[2:].strip(), [])
        else:
            current.append(line)
    return {name: "\n".join(body) for name, body in found.items()}


def json_object(text: str) -> dict[str, Any]:
    value = _json(text)
    return value if isinstance(value, dict) else {}


def json_objects(text: str) -> list[dict[str, Any]]:
    """A list of objects; ``ip -j`` puts empty ones where it has nothing to say."""
    value = _json(text)
    return [item for item in value if isinstance(item, dict) and item] if isinstance(value, list) else []


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
