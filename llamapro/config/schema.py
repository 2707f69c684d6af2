"""A schema as data: what is allowed at a dotted key, in words. Error texts, overrides and the docs page use it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llamapro.config.root import RunConfig

_SCALARS = {bool: "true or false", Path: "a path", NoneType: "null"}
NAME_TEXT = "a name (letters, digits, _ and -)"


def annotation_at(path: Sequence[str], root: type[BaseModel] = RunConfig) -> Any:
    """What the schema says about a key; None where it knows no such key."""
    annotation: Any = root
    for key in path:
        annotation = _child(annotation, key)
        if annotation is None:
            return None
    return annotation


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: the parts of a union, or itself."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [part for argument in get_args(annotation) for part in members(argument)]
    if origin is Annotated and get_origin(get_args(annotation)[0]) in (Union, UnionType):
        return members(get_args(annotation)[0])
    return [annotation]


def names_at(path: Sequence[str], root: type[BaseModel] = RunConfig) -> list[str]:
    """The keys that exist below a key; empty for plain values and free mappings."""
    models = _models(annotation_at(path, root))
    return [name for model in models for name in model.model_fields]


def choices_at(path: Sequence[str], root: type[BaseModel] = RunConfig) -> list[str]:
    """The words that are allowed at a key."""
    parts = members(annotation_at(path, root))
    return [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]


def expected(annotation: Any) -> str:
    """What is allowed, in words: "an integer, at least 1, or auto"."""
    parts = members(annotation)
    return ", or ".join(_expected(part) for part in parts)


def real_path(location: Sequence[str | int], root: type[BaseModel] = RunConfig) -> tuple[str, ...]:
    """The dotted key of a pydantic error location, which also holds names of union alternatives."""
    annotation: Any = root
    path: list[str] = []
    waiting = list(location)
    while waiting:
        if annotation is not None and _tagged(annotation):
            annotation = _chosen(annotation, waiting[1:])
            waiting = waiting[1:]
            continue
        key = waiting.pop(0)
        if key != "[key]":
            path.append(str(key))
            annotation = _child(annotation, str(key)) if annotation is not None else None
    return tuple(path)


def accepts_lone_value(path: Sequence[str], value: Any) -> bool:
    """Whether this key takes a list and this lone value can only be meant as its one item."""
    if value is None or isinstance(value, (list, dict)):
        return False
    parts = members(annotation_at(path))
    takes_list = any(get_origin(_plain(part)) is tuple for part in parts)
    return takes_list and not (isinstance(value, str) and choices_at(path))


def stand_in(annotation: Any) -> Any:
    """Some value of the right shape, so that rules about other keys can still be checked."""
    part = _plain(members(annotation)[0])
    origin = get_origin(part)
    if origin is dict:
        return {"unset": stand_in(get_args(part)[1])}
    if isinstance(part, type) and issubclass(part, BaseModel):
        return {name: stand_in(field.annotation) for name, field in part.model_fields.items() if field.is_required()}
    if origin is Literal:
        return get_args(part)[0]
    return 1 if part in (int, float) else "unset"


def field_annotation(field: FieldInfo) -> Any:
    """A field's annotation with its bounds, which pydantic keeps apart."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation: itself, or what its lists and mappings hold."""
    found = _models(annotation)
    for part in map(_plain, members(annotation)):
        if get_origin(part) in (dict, tuple):
            found += [model for argument in get_args(part) for model in _models(argument)]
    return found


def _child(annotation: Any, key: str) -> Any:
    for part in map(_plain, members(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel) and key in part.model_fields:
            return field_annotation(part.model_fields[key])
        if get_origin(part) is dict:
            return get_args(part)[1]
        if get_origin(part) is tuple and key.isdecimal():
            return get_args(part)[0]
    return None


def _tagged(annotation: Any) -> bool:
    return len([part for part in members(annotation) if part is not NoneType]) > 1


def _chosen(annotation: Any, rest: Sequence[str | int]) -> Any:
    """The alternative that an error's location went into: only one of ours holds other values."""
    holders = [part for part in members(annotation) if get_origin(_plain(part)) in (tuple, dict) or _models(part)]
    return holders[0] if rest and holders else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    parts = [_plain(part) for part in members(annotation)]
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _plain(annotation: Any) -> Any:
    return _plain(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _constraints(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from _constraints(inner)
        for item in metadata:
            yield from item.metadata if isinstance(item, FieldInfo) else [item]


def _description(annotation: Any) -> str | None:
    """How the annotation itself says what is allowed."""
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((item.description for item in metadata if isinstance(item, FieldInfo) and item.description), None)


def _expected(annotation: Any) -> str:
    part = _plain(annotation)
    origin, arguments = get_origin(part), get_args(part)
    if part in _SCALARS:
        return _SCALARS[part]
    if part in (int, float):
        return _expected_number(part, list(_constraints(annotation)))
    if part is str:
        return _description(annotation) or NAME_TEXT
    if origin is Literal:
        return str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}items, each {expected(arguments[0])}"
    if origin is dict:
        return f"a mapping from names to {expected(arguments[1])}"
    return f"a mapping with the keys {', '.join(part.model_fields)}"


def _expected_number(kind: type, constraints: Iterable[Any]) -> str:
    words = ["an integer" if kind is int else "a number"]
    for item in constraints:
        if isinstance(item, Gt):
            words.append("at least 1" if kind is int else f"above {_number(item.gt)}")
        elif isinstance(item, Ge):
            words.append(f"at least {_number(item.ge)}")
        elif isinstance(item, Lt):
            words.append(f"below {_number(item.lt)}")
        elif isinstance(item, Le):
            words.append(f"at most {_number(item.le)}")
    return ", ".join(words)


def _number(bound: Any) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
