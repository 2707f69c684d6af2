"""Attention within the documents of packed rows, and which kernel computes it.

Rows are independent. Within a row a document begins wherever position ids don't go on by one; every position sees its
own document up to itself, and nothing else. Padding whose position ids count up from 0 is one more document.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from llamapro.errors import ModelRefused, UserError

ATTENTION_NAME = "llamapro"
LARGEST_FLASH_HEAD = 256
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias")

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "PackedDocuments", float, int | None], torch.Tensor]


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that was chosen, and why.

    Attributes:
        name: varlen (FlashAttention over all documents at once), sdpa, cudnn or math (one call per document).
    """

    name: str
    reason: str


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a batch lie, when its rows are laid end to end.

    Attributes:
        kernel: what attends within them.
        boundaries: (documents + 1,) int32 on the batch's device: begin of each document, then the number of tokens.
        lengths: tokens of each document; empty when the kernel reads `boundaries`.
        longest: no document has more tokens.
    """

    kernel: Kernel
    boundaries: torch.Tensor
    lengths: tuple[int, ...]
    longest: int


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """The kernel for a device and dtype.

    Args:
        requested: auto, flash, cudnn, sdpa or math.

    Raises:
        UserError: a kernel is asked for by name that can't run here.
    """
    obstacle = _varlen_obstacle(device, dtype, head_dim)
    if requested == "auto":
        if obstacle:
            return AttentionChoice("sdpa", f"one call per document: {obstacle}")
        return AttentionChoice("varlen", "FlashAttention over all documents at once")
    if requested == "flash":
        if obstacle:
            raise UserError(f"engine.attention: flash can't run: {obstacle}; use auto")
        return AttentionChoice("varlen", "asked for: flash")
    if requested == "cudnn" and device.type != "cuda":
        raise UserError(f"engine.attention: cudnn needs a CUDA device, not {device.type}; use auto")
    if requested not in _SDPA_BACKENDS:
        raise UserError(f"engine.attention: {requested!r} is none of auto, flash, cudnn, sdpa, math")
    return AttentionChoice(requested, f"asked for: {requested}")


def pack_documents(position_ids: torch.Tensor, choice: AttentionChoice) -> PackedDocuments:
    """Find the documents of a batch, once per forward pass.

    Args:
        position_ids: (rows, S) int64.
    """
    rows, length = position_ids.shape
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten()
    boundaries = F.pad(starts, (0, 1), value=rows * length).to(torch.int32)
    if choice.name == "varlen":
        return PackedDocuments(_attend_varlen, boundaries, (), length)
    lengths = tuple(boundaries.diff().tolist())
    return PackedDocuments(_sdpa(_SDPA_BACKENDS[choice.name]), boundaries, lengths, max(lengths))


def register_attention() -> str:
    """Make `attend` known to transformers, without a mask; returns its name for `attn_implementation`."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    return ATTENTION_NAME


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: PackedDocuments | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: (rows, heads, S, head_dim); key and value may have fewer heads.
        sliding_window: positions see at most this many tokens, themselves included.
        documents: from `LanguageModel.forward`, which is the only caller.

    Returns:
        (rows, S, heads, head_dim), and no weights.

    Raises:
        ModelRefused: the architecture needs something that isn't computed here.
    """
    assert documents is not None and attention_mask is None, "call the LanguageModel, not the transformers model"
    unsupported = [name for name in UNSUPPORTED_ARGUMENTS if others.get(name) is not None]
    if unsupported or others.get("dropout"):
        raise ModelRefused(f"{type(module).__name__} needs {', '.join(unsupported) or 'dropout'} in attention")
    rows, heads, length, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    flat_query, flat_key, flat_value = (
        states.transpose(1, 2).reshape(rows * length, -1, states.shape[-1]) for states in (query, key, value)
    )
    output = documents.kernel(flat_query, flat_key, flat_value, documents, scale, sliding_window)
    return output.view(rows, length, heads, -1), None


def _no_mask(*arguments: Any, **keywords: Any) -> None:
    return None


def _sdpa(backend: SDPBackend | None) -> Kernel:
    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: PackedDocuments,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        parts = [torch.split(states, list(documents.lengths)) for states in (query, key, value)]
        chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            outputs = [_attend_document(q, k, v, scale, window) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    return kernel


_SDPA_BACKENDS = {"sdpa": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def _attend_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """One document: (tokens, heads, head_dim) each."""
    q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    mask = _window_mask(len(query), window, query.device) if window is not None and len(query) > window else None
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output.squeeze(0).transpose(0, 1)


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: PackedDocuments,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = documents.boundaries, documents.longest
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    if key.shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    assert isinstance(output, torch.Tensor)
    return output


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why torch's variable-length attention can't be used; empty when it can."""
    if device.type != "cuda":
        return f"no variable-length kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in 16 bits, the model in {dtype}"
    if head_dim > LARGEST_FLASH_HEAD:
        return f"FlashAttention has heads of at most {LARGEST_FLASH_HEAD}, the model of {head_dim}"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    missing = {"window_size", "scale", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}"
    return ""
