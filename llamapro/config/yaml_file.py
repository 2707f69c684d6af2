"""A YAML 1.2 mapping with the line of every key. Duplicate keys are errors; tags never construct anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llamapro.errors import UserError

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class YamlMapping:
    """What a file says.

    Attributes:
        values: plain dictionaries, lists and scalars.
        lines: line number, from 1, of each key and list item by its path.
    """

    values: dict[str, Any]
    lines: dict[KeyPath, int]


def read_yaml(path: Path) -> YamlMapping:
    """Read a YAML file whose top is a mapping.

    Raises:
        UserError: the file is missing, is not UTF-8, not YAML, or not a mapping; says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"configuration file {path} does not exist (working directory {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} can't be read: {error}") from error
    values, node = _parse(text, path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of sections (run:, model:, data:, …); it is {_kind(values)}")
    lines: dict[KeyPath, int] = {}
    _collect_lines(node, (), lines, set())
    return YamlMapping(values, lines)


def parse_scalar(text: str) -> Any:
    """The value of one YAML expression, e.g. `2e-4`, `[4, 9]`, `null`; text that is not YAML stays text."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text


def _parse(text: str, path: Path) -> tuple[Any, Node | None]:
    try:
        return YAML(typ="safe", pure=True).load(text), YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise UserError(f"{path}, line {_line(error)}: {_reason(error)}") from error
    except (YAMLError, ValueError) as error:  # such as a date of the 40th of a month
        raise UserError(f"{path} is not YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not a configuration: it is nested too deeply") from error


def _line(error: MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def _reason(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    if "duplicate key" in problem:
        return f"{problem}; keep one of them"
    return f"not YAML: {problem}"


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return {"list": "a list", "str": "text"}.get(type(value).__name__, f"a {type(value).__name__}")


def _collect_lines(node: Node | None, path: KeyPath, lines: dict[KeyPath, int], seen: set[int]) -> None:
    """Note the line of each key and item; what is used in several places, by the first of them.

    Aliases may make a short text an endless one, so no node is looked at twice.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                lines[(*path, key.value)] = key.start_mark.line + 1
                _collect_lines(value, (*path, key.value), lines, seen)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, str(index))] = value.start_mark.line + 1
            _collect_lines(value, (*path, str(index)), lines, seen)
