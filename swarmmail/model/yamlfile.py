"""YAML that remembers its lines, so that every complaint can say where.

Scalars follow the core schema of YAML 1.2.2 (section 10.3.2): only ``true`` and ``false`` are booleans, so
``n``, ``no`` and ``off`` stay text. A key is always text (a host may be called ``10``). Duplicate keys,
tags and several documents in one file are errors. The merge key ``<<`` works, since Compose files use it.
Values never appear in messages of this module's
``read``: a file may hold secrets.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from swarmmail.model.errors import InputError

Place = Sequence[str | int]
"""A key path: ``("hosts", "host1", "port")``."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")}


@dataclass(frozen=True)
class Document:
    """A YAML file as plain Python values, with the line of every key."""

    path: Path
    value: Any
    _root: Node = field(repr=False)

    def line(self, place: Place) -> int:
        """Line (from 1) of a key, or of its nearest parent that exists."""
        node, line = self._root, self._root.start_mark.line
        for step in place:
            if isinstance(node, MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == step), None)
            elif isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
                pair = (node.value[step], node.value[step])
            else:
                pair = None
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        return int(line) + 1

    def problem(self, place: Place, text: str) -> str:
        """One line, whatever stands in the file: ``inventories/lab.yml:12: hosts.host2.role: text``."""
        where = f"{dotted(place)}: " if place else ""
        line = f"{self.path}:{self.line(place)}: {where}{text}"
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def read(path: Path) -> Document:
    """Read one YAML document. Raises InputError for everything that keeps it from being read."""
    text = _text(path)
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise InputError([_syntax(path, text, error)]) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError([f"{path}:{line}: not YAML: a control character"]) from None
    except (YAMLError, ValueError, OverflowError) as error:
        raise InputError([f"{path}:1: not YAML: {' '.join(str(error).split())}"]) from None
    except RecursionError:
        raise InputError([f"{path}:1: not usable: nested too deep"]) from None
    if root is None:
        raise InputError([f"{path}:1: the file is empty"])
    plain = _Plain()
    value = plain.of(root, ())
    document = Document(path, value, root)
    if plain.problems:
        raise InputError([f"{path}:{line}: {text}" for line, text in sorted(set(plain.problems))])
    return document


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError([f"{path}: no such file"]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError([f"{path}: cannot be read: {reason}"]) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError([f"{path}:{line}: not UTF-8 text"]) from None


def _syntax(path: Path, text: str, error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    lines = text.splitlines()
    if line < len(lines) and re.match(r" *\t", lines[line]):
        what = "a tab at the start of the line; YAML indents with spaces only"
    else:
        # the parser's own words say what it wanted and the context what it was about
        what = ": ".join(part for part in (error.context, error.problem) if part) or "syntax error"
        what = " ".join(what.split())
    return f"{path}:{line + 1}: not YAML: column {column + 1}: {what}"


class _Plain:
    """Nodes to Python values. Aliased nodes are converted once, so that nested aliases cost nothing."""

    def __init__(self) -> None:
        self.problems: list[tuple[int, str]] = []
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def of(self, node: Node, place: tuple[str | int, ...]) -> Any:
        if id(node) in self._open:
            self._problem(node, place, "contains itself")
            return None
        if id(node) not in self._done:
            self._open.add(id(node))
            self._done[id(node)] = self._convert(node, place)
            self._open.remove(id(node))
        return self._done[id(node)]

    def _problem(self, node: Node, place: Place, text: str) -> None:
        self.problems.append((node.start_mark.line + 1, f"{dotted(place)}: {text}" if place else text))

    def _convert(self, node: Node, place: tuple[str | int, ...]) -> Any:
        if node.tag not in _PLAIN_TAGS:
            self._problem(node, place, "has a YAML tag (!...), which means nothing here; remove it")
        if isinstance(node, SequenceNode):
            return [self.of(item, (*place, index)) for index, item in enumerate(node.value)]
        if isinstance(node, MappingNode):
            return self._mapping(node, place)
        assert isinstance(node, ScalarNode)
        if node.style is not None or node.tag == _TAG + "str":  # quoted, a block, or !!str
            return node.value
        if re.fullmatch(r"[-+]?0[0-9]+", node.value):  # octal in YAML 1.1 (so for Docker), decimal in YAML 1.2
            self._problem(
                node, place, f"{node.value} is read differently by different programs; write 0o.. or quote it"
            )
        return core_scalar(node.value)

    def _mapping(self, node: MappingNode, place: tuple[str | int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode):
                self._problem(key, place, "has a key that is not a simple text")
            elif key.value == "<<" and key.style is None:
                merged.update({**self._merge(item, place), **merged})
            elif key.value in first:
                self._problem(key, (*place, key.value), f"stands twice, first in line {first[key.value]}")
            else:
                first[key.value] = key.start_mark.line + 1
                result[key.value] = self.of(item, (*place, key.value))
        return {**merged, **result}

    def _merge(self, item: Node, place: tuple[str | int, ...]) -> dict[str, Any]:
        """``<<``: a mapping, or several of which the first wins (YAML 1.1 merge key, which Compose files use)."""
        sources = item.value if isinstance(item, SequenceNode) else [item]
        found: dict[str, Any] = {}
        for source in sources:
            if isinstance(source, MappingNode):
                found = {**self.of(source, place), **found}
            else:
                self._problem(source, place, "<< takes mappings only")
        return found


def core_scalar(text: str) -> str | int | float | bool | None:
    """An unquoted scalar by the core schema of YAML 1.2.2."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,400}", text, re.ASCII):  # longer is no number that anybody means
        return int(text)
    if re.fullmatch(r"0o[0-7]+|0x[0-9a-fA-F]+", text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text, re.ASCII):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


def dotted(place: Place) -> str:
    """``hosts.host1.port``, on one line whatever the keys are."""
    return ".".join(s if isinstance(s, str) and re.fullmatch(r"[\w-]+", s) else short(s) for s in place)


def short(value: object) -> str:
    """A found value for a message: one line, not long."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``did you mean 'manager'?`` when a known word is near, else nothing."""
    if not isinstance(word, str):
        return ""
    spelled = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:80].lower(), list(spelled), n=1, cutoff=0.6)
    return f"did you mean {spelled[near[0]]!r}?" if near else ""


def keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key path that a model allows; ``*`` stands for a name that the user chooses."""
    for name, info in model.model_fields.items():
        yield (*above, name), info
        inner, through = _model_in(info.annotation)
        if inner:
            yield from keys(inner, (*above, name, *through))


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, tuple[str, ...]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ()
    through = ("*",) if get_origin(annotation) is dict else ()
    for part in get_args(annotation):
        inner, rest = _model_in(part)
        if inner:
            return inner, (*through, *rest)
    return None, ()


def place_of(location: Place) -> tuple[str | int, ...]:
    """pydantic's location of an error as a key path: it marks a wrong key by a last step ``[key]``."""
    return tuple(location[:-1] if len(location) > 1 and location[-1] == "[key]" else location)


def problems(
    document: Document, error: ValidationError, model: type[BaseModel], secret: tuple[str, ...] = ()
) -> list[str]:
    """What pydantic found, one line each: what was found, what is allowed (the field's description).

    Values below the key path ``secret`` are not shown.
    """
    known = list(keys(model))
    result = []
    for one in error.errors(include_url=False):
        place = place_of(one["loc"])
        info = next((info for path, info in known if _fits(path, place)), None)
        hidden = bool(secret) and place[: len(secret)] == secret
        reason = str(one["ctx"]["error"]) if one["type"] == "value_error" else ""
        found = kind(one["input"]) if hidden else short(one["input"])
        if one["loc"] != place:  # the key itself is wrong
            text = reason
        elif one["type"] == "missing":
            text = f"missing, allowed: {info.description if info else ''}"
        elif one["type"] == "extra_forbidden":
            allowed = [path[-1] for path, _ in known if _fits(path[:-1], place[:-1])]
            hint = did_you_mean(place[-1], allowed)
            text = f"unknown key, allowed: {', '.join(allowed)}" + (f"; {hint}" if hint else "")
        elif one["type"] in ("model_type", "model_attributes_type", "dict_type"):
            text = f"found {found}, allowed: a mapping"
        else:
            if info and get_origin(info.annotation) is Literal and not reason:
                reason = did_you_mean(one["input"], get_args(info.annotation))
            if one["type"] == "int_type" and isinstance(one["input"], str) and one["input"].isdigit():
                reason = "write it without quotes"
            allowed_text = f"allowed: {info.description}" if info else "" if reason else "allowed: text"
            text = f"found {found}, " + "; ".join(part for part in (allowed_text, reason) if part)
        result.append(document.problem(place, text))
    return result


def _fits(path: tuple[str, ...], place: Place) -> bool:
    return len(path) == len(place) and all(a in ("*", b) for a, b in zip(path, place, strict=True))


def kind(value: object) -> str:
    """The kind of a value, in the words of YAML."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value)) or short(value)
