"""Command-line words `--section.field value` laid over a file's values, without a second schema.

A value is written as in YAML (`2e-4`, `null`, `[4, 9]`); several words make a list. What an override says is checked
together with the file, so its problems are reported in the same list.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamapro.config.schema import accepts_lone_value
from llamapro.config.yaml_file import KeyPath, parse_scalar


@dataclass(frozen=True)
class Override:
    """One setting from the command line: where it goes, what it says, and the word that said so."""

    path: KeyPath
    value: Any
    flag: str


def parse_overrides(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Split command-line words into settings; returns them and one sentence per word that can't be used."""
    found: list[Override] = []
    problems: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        end = position + 1
        if not word.startswith("--") or word == "--":
            problems.append(f"{word!r} is not a setting; write --section.field value")
        else:
            flag, equals, text = word.partition("=")
            while not equals and end < len(words) and not words[end].startswith("--"):
                end += 1
            texts = [text] if equals else list(words[position + 1 : end])
            _append(flag, texts, found, problems)
        position = end
    return found, problems + _repeated(found)


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `values` with the overrides in it, and one sentence per override that leads through a plain value."""
    merged = copy.deepcopy(values)
    problems = []
    for override in overrides:
        inner: Any = merged
        for key in override.path[:-1]:
            inner = _descend(inner, key)
        if isinstance(inner, dict):
            inner[override.path[-1]] = override.value
        elif isinstance(inner, list) and (index := _index(inner, override.path[-1])) is not None:
            inner[index] = override.value
        else:
            problems.append(f"{override.flag}: {'.'.join(override.path[:-1])} has no settings of its own here")
    return merged, problems


def _append(flag: str, texts: Sequence[str], found: list[Override], problems: list[str]) -> None:
    path = tuple(flag.removeprefix("--").split("."))
    if not texts:
        problems.append(f"{flag} has no value; write {flag} VALUE")
        return
    items = [None if text == "None" else parse_scalar(text) for text in texts]
    value = items if len(items) > 1 else items[0]
    if len(items) == 1 and accepts_lone_value(path, value):
        value = [value]
    found.append(Override(path, value, flag))


def _repeated(overrides: Sequence[Override]) -> list[str]:
    paths = [override.path for override in overrides]
    return [f"--{'.'.join(path)} is given more than once" for path in sorted({p for p in paths if paths.count(p) > 1})]


def _descend(inner: Any, key: str) -> Any:
    if isinstance(inner, dict):
        name = _spelled(inner, key)
        if inner.get(name) is None:
            inner[name] = {}
        return inner[name]
    if isinstance(inner, list) and (index := _index(inner, key)) is not None:
        return inner[index]
    return None


def _spelled(holder: dict[str, Any], key: str) -> str:
    """The key as the file spells it: the help shows every hyphen as an underscore."""
    return next((name for name in holder if str(name).replace("-", "_") == key), key)


def _index(items: list[Any], key: str) -> int | None:
    return int(key) if key.isdecimal() and int(key) < len(items) else None
