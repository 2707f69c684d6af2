"""Attention of packed documents, one call of a kernel per document, as one operation of torch.

Where the documents of a batch lie is in a tensor, so a compiled block has the operation in its one graph whatever they
are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llamapro.modeling.kernels import KERNELS, Scoring


@torch.library.custom_op("llamapro::attend_by_document", mutates_args=())
def attend_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor,
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend within documents.

    Args:
        query: (T, heads, width); key: (T, key heads, width); value: (T, key heads, width of the values).
        sinks: (heads,) scores that take part in every softmax and stand for no token.
        boundaries: (documents + 1,) where each document begins, then T; an empty document is none.
        kernel: a name in `KERNELS`.
        scale, window, softcap: see `Scoring`.

    Returns:
        (T, heads, width of the values), and the log-sum-exp of all scores (heads, T) in float32.
    """
    scoring = Scoring(scale, window, softcap)
    output = query.new_empty((*query.shape[:2], value.shape[-1]))
    sums = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    for part in _documents(boundaries):
        output[part], sums[:, part] = KERNELS[kernel].forward(query[part], key[part], value[part], sinks, scoring)
    return output, sums


@torch.library.custom_op("llamapro::attend_by_document_backward", mutates_args=())
def _backward_by_document(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor,
    output: Tensor,
    sums: Tensor,
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (float32, of no element where there are none)."""
    scoring = Scoring(scale, window, softcap)
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    of_sinks = query.new_zeros(0 if sinks is None else query.shape[1], dtype=torch.float32)
    for part in _documents(boundaries):
        inputs = (gradient[part], query[part], key[part], value[part], sinks, output[part], sums[:, part], scoring)
        *parts, of_these_sinks = KERNELS[kernel].backward(*inputs)
        for whole, found in zip(gradients, parts, strict=True):
            whole[part] = found
        if of_these_sinks is not None:
            of_sinks += of_these_sinks
    return *gradients, of_sinks


@attend_by_document.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = query.new_empty((*query.shape[:2], value.shape[-1]))
    return output, query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@_backward_by_document.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    of_sinks = query.new_empty(0 if sinks is None else query.shape[1], dtype=torch.float32)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, boundaries, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, sinks, boundaries, *output)


def _pull_back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, boundaries, output, sums = ctx.saved_tensors
    *gradients, of_sinks = _backward_by_document(
        gradient, query, key, value, sinks, boundaries, output, sums, *ctx.options
    )
    return *gradients, None if sinks is None else of_sinks.to(sinks.dtype), *(None,) * 5


attend_by_document.register_autograd(_pull_back, setup_context=_keep)


def _documents(boundaries: Tensor) -> Iterator[slice]:
    places = boundaries.tolist()
    return (slice(low, high) for low, high in zip(places, places[1:], strict=False) if low < high)
