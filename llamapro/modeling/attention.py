"""Attention within the documents of packed rows, and which kernel computes it.

Rows are independent. Within a row a document begins wherever position ids don't go on by one; every position sees its
own document up to itself, and nothing else. Padding whose position ids count up from 0 is one more document.

This is for models that call transformers' attention interface; `masks` is for the others.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from llamapro.errors import ModelRefused, UserError
from llamapro.modeling.by_document import attend_by_document
from llamapro.modeling.flash import Flash, newest_flash
from llamapro.modeling.kernels import as_wide_as_keys

ATTENTION_NAME = "llamapro"
LARGEST_FLASH_HEAD = 256
BY_THE_MODEL = "model"
VARLEN = "varlen"


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of its attention.

    Attributes:
        head_dim: width of the queries and keys of a head.
        own: why no kernel of ours can compute it; empty when one can.
        scores: why the scores must be at hand, which no fused kernel offers; empty when they needn't.
        windows: whether some layers see a window only.
    """

    head_dim: int
    own: str = ""
    scores: str = ""
    windows: bool = False


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that was chosen, and why.

    Attributes:
        name: varlen (FlashAttention over all documents at once); a name in `kernels.KERNELS` (one call per document);
            or model (the model's own code, with a mask that keeps documents apart).
        flash: which FlashAttention; None where another kernel computes.
    """

    name: str
    reason: str
    flash: Flash | None = None


@dataclass(frozen=True)
class WindowMask:
    """What stands for transformers' mask of a layer with a sliding window, of so many tokens."""

    tokens: int


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a batch lie, when its rows are laid end to end.

    Attributes:
        kernel: what attends within them: `AttentionChoice.name`.
        boundaries: (documents + 1,) int32 on the batch's device: begin of each document, then the number of tokens.
        longest: no document has more tokens.
        attended: ids of the modules that attended within these documents; None: nobody asks.
    """

    kernel: str
    boundaries: torch.Tensor
    longest: int
    attended: set[int] | None = None


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, needs: AttentionNeeds
) -> AttentionChoice:
    """The kernel for a model, a device and a dtype.

    Args:
        requested: auto, flash, cudnn, sdpa or math.

    Raises:
        UserError: a kernel is asked for by name that can't run here.
    """
    if requested == "auto":
        return _fastest(device, dtype, needs)
    if obstacle := kernel_obstacle(requested, device, dtype, needs):
        raise UserError(f"engine.attention: {requested} can't run: {obstacle}; use auto")
    reason = f"asked for: {requested}"
    if requested == "flash":
        return _varlen(device, needs, reason)
    return AttentionChoice(_fused_kernel(device) if requested == "sdpa" else requested, reason)


def _fastest(device: torch.device, dtype: torch.dtype, needs: AttentionNeeds) -> AttentionChoice:
    if needs.own:
        return AttentionChoice(BY_THE_MODEL, f"transformers' own, with a mask between documents: {needs.own}")
    if needs.scores:
        return AttentionChoice("math", f"score by score, one call per document: {needs.scores}")
    if obstacle := _varlen_obstacle(device, dtype, needs.head_dim):
        return AttentionChoice(_fused_kernel(device), f"one call per document: {obstacle}")
    return _varlen(device, needs, "FlashAttention over all documents at once")


def _varlen(device: torch.device, needs: AttentionNeeds, reason: str) -> AttentionChoice:
    flash = newest_flash(_capability(device), needs.head_dim)
    return AttentionChoice(VARLEN, f"{reason}: {flash.name} ({flash.reason})", flash)


def kernel_obstacle(requested: str, device: torch.device, dtype: torch.dtype, needs: AttentionNeeds) -> str:
    """Why a kernel asked for by name can't run; empty when it can."""
    if needs.own:
        return needs.own
    if requested == "math":
        return ""
    if needs.scores:
        return needs.scores
    if requested == "flash":
        return _varlen_obstacle(device, dtype, needs.head_dim)
    if requested == "cudnn" and device.type != "cuda":
        return f"cuDNN is for CUDA devices, not for {device.type}"
    if requested == "cudnn" and needs.windows:
        return "the model's attention has sliding windows, which cuDNN isn't given here"
    return ""


def _fused_kernel(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "efficient"


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 0


def pack_documents(
    position_ids: torch.Tensor, choice: AttentionChoice, boundaries: torch.Tensor | None = None
) -> PackedDocuments:
    """Where the documents of a batch lie, once per forward pass.

    Args:
        position_ids: (rows, S) int64.
        boundaries: (documents + 1,) int32, where that is known; reading it off position ids waits for the device.
    """
    found = document_boundaries(position_ids) if boundaries is None else boundaries
    return PackedDocuments(choice.name, found, position_ids.shape[1])


def document_boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """(documents + 1,) int32: where each document begins when rows are laid end to end, then the number of tokens."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)


def register_attention() -> str:
    """Make `attend` known to transformers, with no mask but a window's; returns its name for `attn_implementation`."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _window_only)
    return ATTENTION_NAME


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: WindowMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    documents: PackedDocuments | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: (rows, heads, S, head_dim); key and value may have fewer heads, the value another width.
        attention_mask: says whether the layer has a window, as it does to transformers' default kernel.
        softcap: see `kernels.Scoring`; s_aux: (heads,) attention sinks.
        documents: from `LanguageModel.forward`, which is the only caller.

    Returns:
        (rows, S, heads, width of the values), and no weights.

    Raises:
        ModelRefused: the architecture needs something that isn't computed here.
    """
    assert documents is not None, "call the LanguageModel, not the transformers model"
    _refuse_others(module, attention_mask, others)
    rows, heads, length, head_dim = query.shape
    window = None if attention_mask is None else attention_mask.tokens
    q, k, v = (part.transpose(1, 2).reshape(rows * length, -1, part.shape[-1]) for part in (query, key, value))
    scale = head_dim**-0.5 if scaling is None else scaling
    if documents.kernel == VARLEN:
        assert softcap is None and s_aux is None, "the model should have chosen the math kernel"
        output = _attend_varlen(q, k, v, documents, scale, window)
    else:
        options = (documents.boundaries, documents.kernel, scale, window, softcap)
        output, _ = attend_by_document(q, k, v, s_aux, *options)
    if documents.attended is not None:
        documents.attended.add(id(module))
    return output.view(rows, length, heads, -1), None


def _refuse_others(module: nn.Module, attention_mask: WindowMask | None, others: dict[str, Any]) -> None:
    if attention_mask is not None and not isinstance(attention_mask, WindowMask):
        raise ModelRefused(f"{type(module).__name__} makes an attention mask of its own")
    if found := [name for name in ("dropout", "position_bias") if others.get(name) not in (None, 0.0)]:
        raise ModelRefused(f"{type(module).__name__} needs {found[0]} in attention")


def _window_only(*arguments: Any, local_size: int | None = None, **keywords: Any) -> WindowMask | None:
    return None if local_size is None else WindowMask(local_size)


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
    values = as_wide_as_keys(value, key)
    output = varlen_attn(query, key, values, bounds, bounds, longest, longest, **options)
    assert isinstance(output, torch.Tensor)
    return output[..., : value.shape[-1]]


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
