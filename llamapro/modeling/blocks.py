"""The three kinds of blocks in training, and blocks switched off.

Prefix blocks, below the lowest one that learns, run without autograd and keep nothing. Frozen blocks above it compute
gradients of their inputs only; their linears keep no inputs, and nothing keeps their weights' data. Trainable blocks do
everything. Of the latter two some may be computed again in the backward pass (`recompute`).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from llamapro.modeling.linear import freeze_linears
from llamapro.modeling.references import KeptByReference, parameters_beside_linears
from llamapro.modeling.trainable import TrainableSet


class BlockKind(Enum):
    """What a block takes part in."""

    PREFIX = "prefix"
    FROZEN = "frozen"
    TRAINABLE = "trainable"


def kind_of(block: int, trainable: TrainableSet) -> BlockKind:
    """The kind of a block under a choice of what learns."""
    if trainable.includes(block):
        return BlockKind.TRAINABLE
    if trainable.lowest is None or block < trainable.lowest:
        return BlockKind.PREFIX
    return BlockKind.FROZEN


def prepare_blocks(blocks: nn.ModuleList, trainable: TrainableSet) -> None:
    """Make every block of the decoder of its kind, in place; parameter names don't change."""
    for index, block in enumerate(blocks):
        kind = kind_of(index, trainable)
        block.__class__ = _with_kind(type(block))  # type: ignore[arg-type]
        block.kind, block.bypassed, block.tuple_length = kind, False, None  # type: ignore[assignment]
        block.recompute = block.compiled = None  # type: ignore[assignment]
        if kind is not BlockKind.TRAINABLE or trainable.adapters is not None:
            freeze_linears(block)


@contextmanager
def bypass(blocks: nn.ModuleList, indices: Iterable[int]) -> Iterator[None]:
    """While it lasts, these blocks pass their residual stream straight on; nested uses add up."""
    with _set_for_now([blocks[index] for index in indices], "bypassed", True):
        yield


@contextmanager
def uncompiled(blocks: nn.ModuleList) -> Iterator[None]:
    """While it lasts, all blocks run operation by operation."""
    with _set_for_now(list(blocks), "compiled", None):
        yield


@contextmanager
def _set_for_now(blocks: list[nn.Module], name: str, value: Any) -> Iterator[None]:
    """While it lasts, an attribute of these blocks has this value."""
    before = [getattr(block, name) for block in blocks]
    for block in blocks:
        setattr(block, name, value)
    try:
        yield
    finally:
        for block, state in zip(blocks, before, strict=True):
            setattr(block, name, state)


class _KindOfBlock:
    """Mixed into a decoder block's class before it.

    Attributes:
        compiled: computes what the block's own code does, given the block as its first argument; None: that code does.
        recompute: calls a function so that what it keeps is computed again in the backward pass; None: it is kept.
        tuple_length: how many values the block returns in a tuple, the hidden states first; 0 where it returns those
            alone; None until it has run.
    """

    kind: BlockKind
    bypassed: bool
    tuple_length: int | None
    recompute: Callable[..., Any] | None
    compiled: Callable[..., Any] | None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(rows, S, hidden) → the same shape, or what the block itself returns."""
        if self.bypassed:
            return self._pass_on(hidden_states, *args, **kwargs)
        compute = super().forward if self.compiled is None else partial(self.compiled, self)  # type: ignore[misc]
        if self.recompute is not None and torch.is_grad_enabled():
            output = self.recompute(compute, hidden_states, *args, **kwargs)
        else:
            with self._autograd():
                output = compute(hidden_states, *args, **kwargs)
        self.tuple_length = len(output) if isinstance(output, tuple) else 0
        return output

    def _autograd(self) -> AbstractContextManager[Any]:
        if self.kind is BlockKind.PREFIX:
            return torch.no_grad()
        parameters = self._referred_to()
        return KeptByReference(parameters) if parameters else nullcontext()

    def _referred_to(self) -> list[nn.Parameter]:
        """The parameters that are kept for the backward pass by reference: a compiled block would keep their data."""
        if self.compiled is not None:
            return list(self.parameters())  # type: ignore[attr-defined]
        return parameters_beside_linears(self) if self.kind is BlockKind.FROZEN else []  # type: ignore[arg-type]

    def _pass_on(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.tuple_length is None:  # bypassed before it ever ran: run it once to see what it returns
            with torch.no_grad():
                output = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            self.tuple_length = len(output) if isinstance(output, tuple) else 0
        if self.tuple_length == 0:
            return hidden_states
        return (hidden_states, *(None,) * (self.tuple_length - 1))


def without_kind(block_class: type) -> type[nn.Module]:
    """A decoder block's own class, of the one that `prepare_blocks` made of it."""
    _, _, own, *_ = block_class.__mro__
    return own


@functools.cache
def _with_kind(block_class: type[nn.Module]) -> type[nn.Module]:
    return type(block_class.__name__, (_KindOfBlock, block_class), {})
