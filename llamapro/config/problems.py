"""What is wrong with a configuration, as complete sentences: key, value, what is allowed, nearest name, and where."""

import copy
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llamapro.config.base import Section
from llamapro.config.rules import BROKEN_RULES, BrokenRule
from llamapro.config.schema import (
    NAME_TEXT,
    annotation_at,
    choices_at,
    expected,
    names_at,
    real_path,
    stand_in,
)
from llamapro.config.yaml_file import KeyPath

UNKNOWN_KEYS = ("extra_forbidden", "invalid_key")
"""Also a key that is no text, such as a number."""
_REPAIR_ROUNDS = 8
_SHOWN_CHARACTERS = 60

Config = TypeVar("Config", bound=Section)


def check_schema(
    root: type[Config], values: Mapping[str, Any], lines: Mapping[KeyPath, int], origins: Mapping[KeyPath, str]
) -> tuple[Config | None, list[str]]:
    """Check values against the schema and against the rules between fields.

    Args:
        root: the whole configuration's class.
        values: what the file and the overrides say.
        lines: line in the file of each key.
        origins: command-line word of each overridden key.

    Returns:
        The configuration, or None and every problem: wrong keys and values, and the broken rules that don't follow
        from them.
    """
    try:
        return root.model_validate(values), []
    except ValidationError as error:
        wrong = _wrong_values(root, error)
        broken = [rule for rule in _broken_rules(root, error, values) if not _follows(rule, wrong)]
    sentences = [(path, text) for path, text in wrong.items()]
    sentences += [(tuple(rule.key.split(".")), rule.text) for rule in broken]
    return None, [f"{'.'.join(path)}: {text}{_where(path, lines, origins)}" for path, text in sentences]


def _wrong_values(root: type[Section], error: ValidationError) -> dict[KeyPath, str]:
    """One sentence per wrong key: the alternatives of a union make several errors, but one problem."""
    details = [(real_path(item["loc"], root), item) for item in _details(error) if item["type"] != BROKEN_RULES]
    deepest = [path for path, _ in details]
    wrong: dict[KeyPath, str] = {}
    for path, item in details:
        covered = any(len(other) > len(path) and other[: len(path)] == path for other in deepest)
        if not covered:
            wrong.setdefault(path, _sentence(root, path, item))
    return wrong


def _sentence(root: type[Section], path: KeyPath, item: ErrorDetails) -> str:
    if item["type"] in UNKNOWN_KEYS:
        return _unknown_key(root, path)
    if item["type"] == "missing":
        return f"is required: {expected(annotation_at(path, root))}"
    if item["loc"][-1] == "[key]":
        return f"{path[-1]!r} is not {NAME_TEXT}"
    value = item["input"]
    nearest = get_close_matches(value, choices_at(path, root), n=1) if isinstance(value, str) else []
    return f"{_shown(value)} is not valid{_hint(nearest)} must be {expected(annotation_at(path, root))}"


def _hint(nearest: Sequence[str]) -> str:
    return f"; did you mean {nearest[0]}? It" if nearest else "; it"


def _unknown_key(root: type[Section], path: KeyPath) -> str:
    names = names_at(path[:-1], root)
    nearest = get_close_matches(path[-1], names, n=1)
    elsewhere = [] if nearest else _sections_with(root, path[-1])
    place = f"keys in {'.'.join(path[:-1])}" if len(path) > 1 else "keys at the top"
    hints = [f"did you mean {name}?" for name in (nearest or elsewhere)[:1]]
    return "; ".join(["unknown key", *hints, f"{place}: {', '.join(names)}"])


def _sections_with(root: type[Section], name: str) -> list[str]:
    """Dotted keys of sections that do have this name: a setting in the wrong section."""
    return [f"{section}.{name}" for section in root.model_fields if name in names_at((section,), root)]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def _where(path: KeyPath, lines: Mapping[KeyPath, int], origins: Mapping[KeyPath, str]) -> str:
    """The command-line word or the line that this key, or the nearest one above it, comes from."""
    for length in range(len(path), 0, -1):
        if flag := origins.get(path[:length]):
            return f" (from {flag})"
        if line := lines.get(path[:length]):
            return f" (line {line})"
    return ""


def _details(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False)


def _broken_rules(root: type[Section], error: ValidationError, values: Mapping[str, Any]) -> Sequence[BrokenRule]:
    """The rules broken by what is right in `values`: wrong parts are taken out, missing ones stood in for."""
    repaired = copy.deepcopy(dict(values))
    for _ in range(_REPAIR_ROUNDS):
        for item in _details(error):
            if item["type"] == BROKEN_RULES:
                broken: Sequence[BrokenRule] = item["ctx"]["broken"]
                return broken
            _repair(root, repaired, real_path(item["loc"], root), missing=item["type"] == "missing")
        try:
            root.model_validate(repaired)
        except ValidationError as next_error:
            error = next_error
        else:
            break
    return ()


def _repair(root: type[Section], values: dict[str, Any], path: KeyPath, *, missing: bool) -> None:
    """Give a missing key a value of the right shape; take a wrong key out, with the list that it stands in."""
    holder: dict[str, Any] = values
    for key in path[:-1]:
        inner = holder.get(key)
        if not isinstance(inner, dict):
            holder.pop(key, None)
            return
        holder = inner
    if missing:
        holder[path[-1]] = stand_in(annotation_at(path, root))
    else:
        holder.pop(path[-1], None)


def _follows(rule: BrokenRule, wrong: Mapping[KeyPath, str]) -> bool:
    """Whether a broken rule may only be the consequence of a value that is wrong itself."""
    return any(_reads(key, ".".join(path)) for key in rule.reads for path in wrong)


def _reads(key: str, wrong: str) -> bool:
    whole = key.removesuffix(".*")
    inside = key.endswith(".*") and wrong.startswith(whole + ".")
    return inside or whole == wrong or whole.startswith(wrong + ".")
