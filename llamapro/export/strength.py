"""New blocks exported at a strength below 1: their declared tensors scaled, byte stream by byte stream.

What is scaled is what an export at strength 1 holds, in its dtype: a model in memory at the same strength has the same
bits.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from llamapro.errors import UserError
from llamapro.evaluation.strength import dialled
from llamapro.expansion.families import Family, family_named
from llamapro.expansion.record import ExpansionRecord
from llamapro.expansion.strength import Strengths, blocks_above_base, dialled_tensor
from llamapro.export.tensors import ExportTensor
from llamapro.files.tensors import FLOAT_DTYPES


@dataclass(frozen=True)
class StrengthRequest:
    """Strengths as a user asks for them: one for all new blocks, and others for some by name.

    Attributes:
        reason: where they come from, for the model card; "" where the user just named them.
    """

    everywhere: float = 1.0
    by_block: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""

    def resolved(self, record: ExpansionRecord | None) -> Strengths:
        """The strength of each block that is not written as training left it.

        Args:
            record: of what is exported, with all that was ever trained.

        Raises:
            UserError: the model has no trained new blocks, not those that are named, or more than those were trained.
        """
        if self.everywhere == 1 and not self.by_block:
            return {}
        if record is None:
            raise UserError("--strength: the model was never expanded, so it has no new blocks")
        fresh = record.untrained_blocks()
        blocks = [block for block in blocks_above_base(record) if block not in fresh]
        if absent := sorted(self.by_block.keys() - set(blocks)):
            known = ", ".join(map(str, blocks)) or "there are none"
            raise UserError(f"--strength: block {absent[0]} is no trained new block ({known})")
        strengths = {block: self.by_block.get(block, self.everywhere) for block in blocks}
        return {block: strength for block, strength in strengths.items() if strength != 1}


def at_strengths(
    tensors: Iterable[ExportTensor], record: ExpansionRecord | None, strengths: Strengths
) -> list[ExportTensor]:
    """The tensors of an export with the declared ones of some blocks scaled."""
    if record is None:
        return list(tensors)
    family = family_named(record.family)
    return [_at_strength(tensor, family, strengths) for tensor in tensors]


def scaled_names(tensors: Iterable[ExportTensor], record: ExpansionRecord, strengths: Strengths) -> list[str]:
    """The tensors that `at_strengths` scales."""
    family, names = family_named(record.family), [tensor.planned.name for tensor in tensors]
    return [name for name in names if (found := dialled_tensor(family, name)) and found[0] in strengths]


def _at_strength(tensor: ExportTensor, family: Family, strengths: Strengths) -> ExportTensor:
    found = dialled_tensor(family, tensor.planned.name)
    if found is None or found[0] not in strengths:
        return tensor
    block, filling = found
    chunks, dtype = tensor.chunks, tensor.planned.dtype
    return replace(tensor, chunks=lambda: _dialled_chunks(chunks(), dtype, filling, strengths[block]), own=True)


def _dialled_chunks(chunks: Iterable[bytes], dtype: str, filling: float, strength: float) -> Iterator[bytes]:
    for chunk in chunks:
        values = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, FLOAT_DTYPES[dtype]))
        yield dialled(values, filling, strength).view(torch.uint8).numpy().tobytes()


def parse_strength(text: str) -> StrengthRequest:
    """What `--strength` says: "0.75", or "4=0.5,9=0.8", or one for all and others for some: "0.75,4=0".

    Raises:
        UserError: it can't be understood, or a strength is not between 0 and 1.
    """
    everywhere, by_block = 1.0, {}
    for position, part in enumerate(text.split(",")):
        block, equals, number = part.rpartition("=")
        if equals and block.strip().isdecimal():
            by_block[int(block)] = _strength(number, text)
        elif not equals and position == 0:
            everywhere = _strength(number, text)
        else:
            raise UserError(f"--strength {text!r}: write a number, or BLOCK=NUMBER separated by commas, e.g. 4=0.5,9=0")
    return StrengthRequest(everywhere, by_block)


def parse_strengths(text: str) -> Sequence[float]:
    """Strengths separated by commas.

    Raises:
        UserError: one is no number between 0 and 1.
    """
    return [_strength(part, text) for part in text.split(",")]


def _strength(number: str, given: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"strength {number!r} of {given!r} is no number; give one from 0 to 1") from None
    if not 0 <= value <= 1:
        raise UserError(f"strength {number} of {given!r} is not between 0 (the base) and 1 (as trained)")
    return value
