"""What a model's parameters are made of: tensors of its folder, under the names and in the forms they are stored in.

transformers holds some of them under another name, and the matrices of all experts of a block as one parameter. By its
own account of that (`transformers.conversion_mapping`) each parameter becomes a list of stored tensors that lie one
after another in its memory; whatever is read, proved, saved and exported is then a slice of a stored tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from llamapro.errors import ModelRefused
from llamapro.files.tensors import TensorEntry

Shape = tuple[int, ...]
Rows = list[list[TensorEntry]]


@dataclass(frozen=True)
class Part:
    """A stored tensor within a parameter.

    Attributes:
        name: of the stored tensor; `shape`: also of that.
        start: where in the flattened parameter its first element lies.
    """

    name: str
    shape: Shape
    start: int

    @property
    def count(self) -> int:
        """Its number of elements."""
        return prod(self.shape)


class Cut(NamedTuple):
    """What a slice of a parameter holds of one stored tensor.

    Attributes:
        start: of the piece's first element in the flattened stored tensor.
        low, high: where the piece lies in the slice.
    """

    part: Part
    start: int
    low: int
    high: int


class StoredParts:
    """The parts of a model's parameters, and of those of its buffers that are stored."""

    def __init__(self, parts: Mapping[str, Sequence[Part]]) -> None:
        """`parts`: by name in the transformers model. Parts that overlap are stored copies of the same weights."""
        self._parts = dict(parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def rearranged(self, renamed: Mapping[str, str], added: Mapping[str, Sequence[Part]]) -> "StoredParts":
        """The parts when some parameters have got other names, and some have been added."""
        return StoredParts({renamed.get(name, name): parts for name, parts in self._parts.items()} | dict(added))

    def of(self, name: str) -> Sequence[Part]:
        """The parts of a parameter."""
        return self._parts[name]

    def names(self, parameters: Iterable[str]) -> list[str]:
        """The stored tensors that some parameters are made of."""
        return [part.name for parameter in parameters for part in self._parts[parameter]]

    def cuts(self, parameter: str, start: int, count: int) -> Iterator[Cut]:
        """Divide a slice of a flattened parameter by the stored tensors it belongs to."""
        for part in self._parts[parameter]:
            low, high = max(start, part.start), min(start + count, part.start + part.count)
            if low < high:
                yield Cut(part, low - part.start, low - start, high - start)


@dataclass(frozen=True)
class Assembly:
    """How one tensor of the model is put together from stored ones.

    Attributes:
        entries: the stored tensors, in the order in which they lie in its memory.
        shape: what they make.
        fault: why they can't be put together, or "".
    """

    entries: tuple[TensorEntry, ...]
    shape: Shape
    fault: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The entries with their places."""
        starts = [0]
        for entry in self.entries:
            starts.append(starts[-1] + prod(entry.shape))
        return tuple(Part(entry.name, entry.shape, start) for entry, start in zip(self.entries, starts, strict=False))


def assemblies(hf: PreTrainedModel, entries: Mapping[str, TensorEntry]) -> tuple[dict[str, Assembly], list[str]]:
    """How transformers would make each tensor of a model's state from those of a folder.

    Returns:
        The assemblies by name in the model, and the stored tensors that have no place in it.

    Raises:
        ModelRefused: this version of transformers does not say.
    """
    collected, unknown = _collected(hf, entries)
    return {name: _assembly(name, conversion, stored) for name, (conversion, stored) in collected.items()}, unknown


# What the stored tensors of a target are, by the pattern that their names match.
_Stored = dict[str, list[TensorEntry]]


def _collected(
    hf: PreTrainedModel, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, tuple[Any | None, _Stored]], list[str]]:
    """The stored tensors by what they become, as `from_pretrained` assigns them, with the conversion that does it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise ModelRefused(
            f"transformers {version('transformers')} doesn't say how it makes parameters from stored tensors in a way "
            f"known here ({error}); install one from 5.3 to 5.23"
        ) from error
    conversions = get_model_conversion_mapping(hf)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    state, prefix = hf.state_dict(), hf.base_model_prefix
    collected: dict[str, tuple[Any | None, _Stored]] = {}
    unknown: list[str] = []
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unknown.append(name)
            continue
        conversion = next((each for each in converters if pattern in each.source_patterns), None)
        _, stored = collected.setdefault(target, (conversion, {}))
        stored.setdefault(pattern or "", []).append(entries[name])
    return collected, unknown


def _assembly(target: str, conversion: Any | None, stored: _Stored) -> Assembly:
    entries = tuple(entry for tensors in stored.values() for entry in tensors)
    if conversion is None or "" in stored:
        clash = ", ".join(entry.name for entry in entries[:3])
        return Assembly(entries, entries[0].shape, f"{clash} are all {target}" if len(entries) > 1 else "")
    operations = tuple((type(step).__name__, getattr(step, "dim", None)) for step in conversion.operations)
    if operations not in _ROWS or len(conversion.target_patterns) > 1:
        steps = ", ".join(map(repr, conversion.operations))
        return Assembly(entries, (), f"{target} is made of {entries[0].name} by {steps}, which isn't understood here")
    columns = [stored.get(pattern, []) for pattern in conversion.source_patterns]
    rows, stacked = _ROWS[operations](columns)
    shapes = {_joined_shape(row) for row in rows}
    uneven = len({len(column) for column in columns}) > 1 or len(shapes) != 1 or None in shapes
    if uneven or len({entry.dtype for entry in entries}) > 1:
        return Assembly(entries, (), f"the tensors that make {target} don't go together, among them {entries[0].name}")
    (shape,) = shapes
    assert shape is not None
    return Assembly(tuple(entry for row in rows for entry in row), (len(rows), *shape) if stacked else shape)


def _joined_shape(row: Sequence[TensorEntry]) -> Shape | None:
    """The shape of tensors that are joined along their first dimension; None if they can't be."""
    if not all(entry.shape for entry in row) or len({entry.shape[1:] for entry in row}) != 1:
        return None
    return (sum(entry.shape[0] for entry in row), *row[0].shape[1:])


def _stack(columns: Rows) -> tuple[Rows, bool]:
    """One tensor per expert."""
    return [[entry] for column in columns for entry in column], True


def _stack_of_joined(columns: Rows) -> tuple[Rows, bool]:
    """Of each expert several tensors, one below the other: gate and up."""
    return [list(row) for row in zip(*columns, strict=False)], True


def _join(columns: Rows) -> tuple[Rows, bool]:
    """All of them, one below the other."""
    return [[entry for column in columns for entry in column]], False


# Conversions after which the elements of each stored tensor still lie one after another, in their own order.
_ROWS: Mapping[tuple[tuple[str, int | None], ...], Callable[[Rows], tuple[Rows, bool]]] = {
    (("MergeModulelist", 0),): _stack,
    (("MergeModulelist", 0), ("Concatenate", 1)): _stack_of_joined,
    (("Concatenate", 0),): _join,
}
