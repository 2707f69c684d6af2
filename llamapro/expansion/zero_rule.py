"""The zero rule, read back from files: exactly the declared tensors of a fresh copy are zero."""

from collections.abc import Iterable

import numpy as np

from llamapro.expansion.families import Family, block_tensor_name, is_zeroed, split_block_name
from llamapro.files.tensors import TensorFolder


def is_all_zero(tensors: TensorFolder, name: str) -> bool:
    """Whether every bit of a tensor is zero."""
    return not any(np.frombuffer(chunk, dtype=np.uint8).any() for chunk in tensors.chunks(name))


def declared_zero(family: Family, names: Iterable[str], blocks: Iterable[int]) -> tuple[str, ...]:
    """The tensors that the family's rule wants zero in these blocks: all required ones, and the optional ones there."""
    wanted = tuple(blocks)
    required = {block_tensor_name(family, block, rest) for block in wanted for rest in family.zeroed}
    parsed = ((name, split_block_name(family, name)) for name in names)
    present = {name for name, parts in parsed if parts and parts[0] in wanted and is_zeroed(family, parts[1])}
    return tuple(sorted(required | present))


def zero_rule_problems(
    family: Family, tensors: TensorFolder, blocks: Iterable[int], zeroed: Iterable[str]
) -> list[str]:
    """What is wrong with fresh blocks: one sentence for each tensor that breaks the rule.

    Args:
        blocks: fresh new blocks.
        zeroed: the tensors that the record says were zeroed in them.
    """
    declared = declared_zero(family, tensors.entries, blocks)
    different = sorted(set(declared) ^ set(zeroed))
    problems = [
        f"{name}: the record and the rule of family {family.name} disagree whether it is zeroed" for name in different
    ]
    for name in declared:
        if name not in tensors.entries:
            problems.append(f"{name} is missing; it must be there and be zero")
        elif not is_all_zero(tensors, name):
            problems.append(f"{name} is not zero, so its new block is not the identity")
    return problems
