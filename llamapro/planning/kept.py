"""What each block keeps for its backward pass, read off transformers' own code: it runs on the meta device, where
tensors have sizes and no contents, and autograd is asked what it would keep.

A model whose code looks at values can't run like that; of such a one nothing is known here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PLANNED_ATTENTION: Final = "llamapro-planned"
_DTYPES: Final = {2: torch.bfloat16, 4: torch.float32}
_LONGEST: Final = 1024


@dataclass(frozen=True)
class Kept:
    """Bytes per token that a block keeps.

    Attributes:
        fixed: whatever the sequence's length.
        per_key: for each token of the sequence, where attention keeps its scores.
    """

    fixed: float
    per_key: float = 0.0

    def at(self, sequence_length: int) -> float:
        """Bytes per token of a sequence."""
        return self.fixed + self.per_key * sequence_length


KeptByKind = Mapping[tuple[int, bool], Kept]
"""By bytes of an activation (2, 4), and whether the block's parameters learn."""


def kept_by_blocks(config: "PretrainedConfig", decoder: str, *, own_attention: bool) -> list[KeptByKind] | None:
    """What every block keeps; None where the model's code can't run without values.

    Args:
        decoder: name of the list of blocks.
        own_attention: the model doesn't attend through transformers' interface.
    """
    model = _without_weights(config, own_attention)
    found: dict[tuple[int, bool], list[Kept]] = {}
    try:
        for width, dtype in _DTYPES.items():
            for trainable in (False, True):
                nn.Module.to(model, dtype).requires_grad_(trainable)
                found[width, trainable] = _lines(model, decoder)
    except (RuntimeError, NotImplementedError):  # what torch raises when a value is asked for, or a kernel has no sizes
        return None
    return [dict(zip(found, lines, strict=True)) for lines in zip(*found.values(), strict=True)]


def _lines(model: "PreTrainedModel", decoder: str) -> list[Kept]:
    """Two lengths tell what a token costs from what it costs to see another one."""
    long = min(_LONGEST, getattr(model.config, "max_position_embeddings", None) or _LONGEST)
    short = long // 2
    pairs = zip(*(_kept_by_blocks_at(model, decoder, length) for length in (short, long)), strict=True)
    slopes = [(low, max(0.0, (high - low) / (long - short))) for low, high in pairs]
    return [Kept(low - slope * short, slope) for low, slope in slopes]


def _without_weights(config: "PretrainedConfig", own_attention: bool) -> "PreTrainedModel":
    AttentionInterface.register(PLANNED_ATTENTION, _attend)
    AttentionMaskInterface.register(PLANNED_ATTENTION, _no_mask)
    attention = {} if own_attention else {"attn_implementation": PLANNED_ATTENTION}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False, **attention
        )
    return model.eval()  # type: ignore[no-any-return, no-untyped-call]


def _kept_by_blocks_at(model: "PreTrainedModel", decoder: str, length: int) -> list[float]:
    """Bytes per token of each block in a sequence of so many tokens."""
    blocks = list(model.get_submodule(decoder).children())
    firsts = _first_of_its_like(blocks)
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with _watching(model, blocks) as totals, _passing_on(blocks, firsts), _FusedKernels():
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return [totals[first] / length for first in firsts]


def _first_of_its_like(blocks: Sequence[nn.Module]) -> list[int]:
    """For each block the first one that differs from it in nothing but its number."""
    likenesses = [_likeness(block) for block in blocks]
    return [likenesses.index(likeness) for likeness in likenesses]


def _likeness(block: nn.Module) -> list[Any]:
    numbers = {"layer_idx", "layer_id", "layer_number"}
    plain = bool | int | float | str | None
    return [
        (
            name,
            type(module),
            {key: value for key, value in vars(module).items() if key not in numbers and isinstance(value, plain)},
            {key: value.shape for key, value in module.named_parameters(recurse=False)},
        )
        for name, module in block.named_modules()
    ]


@contextmanager
def _passing_on(blocks: Sequence[nn.Module], firsts: Sequence[int]) -> Iterator[None]:
    """While it lasts, a block that is like an earlier one passes its input on in what that one returned."""
    returned: dict[int, Any] = {}

    def pass_on(first: int, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        output = returned[first]
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    handles = [
        block.register_forward_hook(lambda _, __, output, index=index: returned.update({index: output}))
        for index, block in enumerate(blocks)
        if firsts[index] == index
    ]
    repeated = [
        (block, first) for index, (block, first) in enumerate(zip(blocks, firsts, strict=True)) if first < index
    ]
    for block, first in repeated:
        block.forward = partial(pass_on, first)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, _ in repeated:
            del block.forward


@contextmanager
def _watching(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """While it lasts, sum up the bytes that each block keeps: its own tensors, each once.

    Parameters, buffers and what all blocks are handed (positions, masks) are not a block's own.
    """
    totals = [0] * len(blocks)
    inside: list[int] = []
    known = {_storage(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside and _storage(tensor) not in known:
            known[_storage(tensor)] = tensor  # held, so that no other storage takes its place
            totals[inside[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, *others = args
        known.update((_storage(tensor), tensor) for tensor in _tensors((others, kwargs)))
        inside.append(index)
        return (hidden_states.detach().requires_grad_(), *others), kwargs

    handles = [
        handle
        for index, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(lambda _, a, k, index=index: enter(index, a, k), with_kwargs=True),
            block.register_forward_hook(lambda *_: inside.clear()),
        )
    ]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield totals
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: torch.Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention's sizes, which are a fused kernel's also where every score is needed: those are computed again.

    Args:
        query: (rows, heads, S, head_dim); key and value may have fewer heads.
    """
    width = value.shape[-1]
    padded = F.pad(value, (0, key.shape[-1] - width)) if width < key.shape[-1] else value  # kernels know one width
    output: torch.Tensor = _Fused.apply(query, key, padded)  # type: ignore[no-untyped-call]
    return output[..., :width], None


class _Fused(torch.autograd.Function):
    """(rows, heads, S, width) each → (rows, S, heads, width). Keeps what FlashAttention keeps."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.transpose(1, 2).new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1])
        scales = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, scales)
        return output


class _FusedKernels(TorchFunctionMode):
    """While it lasts, attention keeps what a fused kernel does, and products of experts need none.

    On the meta device torch would keep every score, and know the products' sizes in bf16 only. Fused kernels want as
    many heads of keys as of queries: where a model's own code gives them fewer, every score is really kept.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].shape[:2] == args[1].shape[:2]:
            return _Fused.apply(*args[:3]).transpose(1, 2)  # type: ignore[no-untyped-call]
        if function in (getattr(F, "grouped_mm", None), torch._grouped_mm):
            return _Grouped.apply(*args[:2])  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))


class _Grouped(torch.autograd.Function):
    """(tokens, in) × (experts, in, out) → (tokens, out)."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(input)
        return input.new_empty(len(input), weight.shape[-1])
