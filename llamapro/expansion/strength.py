"""The strength of new blocks: which blocks lead back to a base, and which of their tensors are scaled on the way.

A new block writes to the residual stream through its declared tensors alone, which the zero rule fills in a fresh copy.
At strength 0 they hold that filling again and the block does nothing; at strength 1 they are what training made them.
"""

from collections.abc import Mapping

from llamapro.errors import UserError
from llamapro.expansion.families import Family, is_zeroed, split_block_name, zeroed_value
from llamapro.expansion.record import ExpansionRecord

Strengths = Mapping[int, float]
"""Strengths from 0 to 1 by block; blocks that are not named keep strength 1."""


def blocks_above_base(record: ExpansionRecord) -> tuple[int, ...]:
    """The added blocks without which a model computes what a base of it computed, bit for bit.

    They are those of the latest expansion; those of earlier ones too, where blocks of them were trained afterwards.

    Raises:
        UserError: something was trained that no expansion added, so that leaving blocks out leads to no base.
    """
    history = [(entry.new_blocks, entry.trained) for entry in record.lineage]
    above: set[int] = set()
    moved: set[int | str] = set()
    for added, trained in reversed([*history, (record.new_blocks, record.trained)]):
        above.update(added)
        moved.update(trained.blocks, trained.tensors)
        if moved <= above:
            return tuple(sorted(above))
    others = ", ".join(map(str, sorted(moved - above, key=str)[:5]))
    raise UserError(
        f"blocks or tensors of the base itself were trained ({others}), so no strength of the new blocks leads back to "
        "the base; this works for models that learned in their new blocks alone"
    )


def dialled_tensor(family: Family, name: str) -> tuple[int, float] | None:
    """The block of a declared tensor, and the value that fills it at strength 0; None for all other tensors."""
    parsed = split_block_name(family, name)
    if parsed is None or not is_zeroed(family, parsed[1]):
        return None
    return parsed[0], zeroed_value(family, parsed[1])


def described(strengths: Strengths) -> str:
    """Strengths in words: "0.75 (blocks 4, 9)"; "" for none."""
    values = sorted(set(strengths.values()))
    groups = [(value, [block for block in sorted(strengths) if strengths[block] == value]) for value in values]
    return ", ".join(f"{value:.10g} (blocks {', '.join(map(str, blocks))})" for value, blocks in groups)
