"""Attention kernels for one document: forward and backward, with nothing kept between but the log-sum-exp.

Everything is laid end to end: (tokens, heads, width). Queries may have more heads than keys; consecutive ones share a
key head. Each position sees the document up to itself, or as much of that as the window lets it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """How one attention layer scores keys.

    Attributes:
        scale: of the products.
        window: positions see at most this many tokens, themselves included; None: all.
        softcap: scores s become cap · tanh(s / cap); None: they stay.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Kernel:
    """Attention of one document.

    Attributes:
        forward: (query, key, value, sinks, scoring) → output and log-sum-exp (heads, tokens).
        backward: (gradient, query, key, value, sinks, output, log-sum-exp, scoring) → gradients of query, key, value
            and sinks.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


# Its log-sum-exp is as long as the next multiple.
_EFFICIENT_ALIGNMENT: Final = 32


def _by_key_head(states: Tensor, key_heads: int) -> Tensor:
    """(tokens, heads, width) → (key heads, queries that share one, tokens, width), without a copy."""
    tokens, heads, width = states.shape
    return states.view(tokens, key_heads, heads // key_heads, width).permute(1, 2, 0, 3)


def _end_to_end(states: Tensor) -> Tensor:
    """`_by_key_head` the other way round."""
    return states.permute(2, 0, 1, 3).flatten(1, 2)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(length, length): which keys, in columns, each position sees."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def _score(query: Tensor, key: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Scores (key heads, group, tokens, tokens) in the dtype of the states, capped, then -inf where nothing is seen;
    and what capping multiplies gradients by."""
    scores = _by_key_head(query, key.shape[1]) @ _by_key_head(key, key.shape[1]).transpose(2, 3) * scoring.scale
    slope = torch.ones((), dtype=scores.dtype, device=scores.device)
    if scoring.softcap is not None:
        tangent = torch.tanh(scores / scoring.softcap)
        scores, slope = tangent * scoring.softcap, 1 - tangent * tangent
    unseen = ~visible(len(query), scoring.window, query.device)
    return scores.masked_fill(unseen, -torch.inf), slope


def _math_forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Every score at hand; softmax in float32."""
    heads, key_heads = query.shape[1], key.shape[1]
    scores = _score(query, key, scoring)[0].float()
    sums = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        sums = torch.logaddexp(sums, sinks.float().view(key_heads, -1, 1))
    weights = torch.exp(scores - sums.unsqueeze(-1)).to(value.dtype)
    return _end_to_end(weights @ _by_key_head(value, key_heads)), sums.view(heads, -1)


def _math_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    sums: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    key_heads, dtype = key.shape[1], value.dtype
    upstream, result = (_by_key_head(states, key_heads) for states in (gradient, output))
    scores, slope = _score(query, key, scoring)
    grouped_sums = sums.view(key_heads, -1, len(query), 1)
    weights = torch.exp(scores.float() - grouped_sums)
    of_value = (weights.to(dtype).transpose(2, 3) @ upstream).sum(1, keepdim=True)
    of_weights = (upstream @ _by_key_head(value, key_heads).transpose(2, 3)).float()
    pulled = (upstream.float() * result.float()).sum(-1, keepdim=True)  # what raising every score together would change
    of_scores = (weights * (of_weights - pulled)).to(dtype) * slope * scoring.scale
    of_query = of_scores @ _by_key_head(key, key_heads)
    of_key = (of_scores.transpose(2, 3) @ _by_key_head(query, key_heads)).sum(1, keepdim=True)
    of_sinks = None
    if sinks is not None:
        shares = torch.exp(sinks.float().view(key_heads, -1, 1, 1) - grouped_sums)
        of_sinks = -(shares * pulled).sum((2, 3)).flatten()
    return _end_to_end(of_query), _end_to_end(of_key), _end_to_end(of_value), of_sinks


def as_wide_as_keys(value: Tensor, key: Tensor) -> Tensor:
    """Fused kernels know one width; further columns of zeros change no others."""
    assert value.shape[-1] <= key.shape[-1], "values are wider than keys"
    return torch.nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1]))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As a fused kernel takes them: a batch of key heads, in each the queries that share it; keys aren't copied."""
    key_heads = key.shape[1]
    q = _by_key_head(query, key_heads)
    k, v = (_by_key_head(states, key_heads).expand(-1, q.shape[1], -1, -1) for states in (key, value))
    return q, k, v


def _window_bias(query: Tensor, scoring: Scoring) -> Tensor | None:
    """What is added to the scores where the window matters; None where causality is all."""
    if scoring.window is None or len(query) <= scoring.window:
        return None
    seen = visible(len(query), scoring.window, query.device)
    return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """What torch's scaled_dot_product_attention computes on CPUs."""
    _refuse_scores_by_hand(sinks, scoring)
    bias = _window_bias(query, scoring)
    states = _grouped(query, key, as_wide_as_keys(value, key))
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *states, 0.0, bias is None, attn_mask=bias, scale=scoring.scale
    )
    return _end_to_end(output)[..., : value.shape[-1]], sums.flatten(0, 1)


def _cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    sums: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """In float32, which torch does three times as fast as in bf16 where documents are short."""
    bias, key_heads = _window_bias(query.float(), scoring), key.shape[1]
    upstream, result, wide_value = (as_wide_as_keys(states, key).float() for states in (gradient, output, value))
    q, k, v = _grouped(query.float(), key.float(), wide_value)
    of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _by_key_head(upstream, key_heads),
        q,
        k,
        v,
        _by_key_head(result, key_heads),
        sums.view(q.shape[:3]),
        0.0,
        bias is None,
        attn_mask=bias,
        scale=scoring.scale,
    )
    return _gradients(of_query, of_key, of_value, value)


def _gradients(
    of_query: Tensor, of_key: Tensor, of_value: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A fused kernel's gradients laid end to end; queries that share a key head add up."""
    of_keys, of_values = (_end_to_end(states.sum(1, keepdim=True)) for states in (of_key, of_value))
    return _end_to_end(of_query), of_keys, of_values[..., : value.shape[-1]], None


def _refuse_scores_by_hand(sinks: Tensor | None, scoring: Scoring) -> None:
    assert sinks is None and scoring.softcap is None, "the model should have chosen the math kernel"


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """torch's memory-efficient attention on CUDA devices, which also computes in float32."""
    _refuse_scores_by_hand(sinks, scoring)
    states, bias = _grouped(query, key, as_wide_as_keys(value, key)), _window_bias(query, scoring)
    output, sums, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *states, _for_all_heads(bias, query, key), True, 0.0, bias is None, scale=scoring.scale
    )
    return _end_to_end(output)[..., : value.shape[-1]], sums[..., : len(query)].flatten(0, 1)


def _efficient_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    sums: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    bias, key_heads = _window_bias(query, scoring), key.shape[1]
    upstream, result = (_by_key_head(as_wide_as_keys(states, key), key_heads) for states in (gradient, output))
    q, k, v = _grouped(query, key, as_wide_as_keys(value, key))
    padding = -len(query) % _EFFICIENT_ALIGNMENT
    padded_sums = torch.nn.functional.pad(sums.view(q.shape[:3]), (0, padding), value=torch.inf)
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    of_query, of_key, of_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        upstream,
        q,
        k,
        v,
        _for_all_heads(bias, query, key),
        result,
        padded_sums,
        no_dropout,
        no_dropout,
        0.0,
        [True, True, True, False],
        bias is None,
        scale=scoring.scale,
    )
    return _gradients(of_query, of_key, of_value, value)


def _cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """cuDNN's attention. It is never given a mask: with one, some lengths have given wrong gradients."""
    _refuse_scores_by_hand(sinks, scoring)
    assert _window_bias(query, scoring) is None, "the model should have chosen a kernel that knows windows"
    states = _grouped(query, key, as_wide_as_keys(value, key))
    output, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *states, None, True, 0.0, True, False, scale=scoring.scale
    )
    return _end_to_end(output)[..., : value.shape[-1]], sums.view(query.shape[1], -1)


def _cudnn_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    sums: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    key_heads = key.shape[1]
    upstream, result = (_by_key_head(as_wide_as_keys(states, key), key_heads) for states in (gradient, output))
    q, k, v = _grouped(query, key, as_wide_as_keys(value, key))
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    grouped_sums = sums.view(*q.shape[:3], 1)
    of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        upstream,
        q,
        k,
        v,
        result,
        grouped_sums,
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        len(query),
        len(query),
        0.0,
        True,
        scale=scoring.scale,
    )
    return _gradients(of_query, of_key, of_value, value)


def _for_all_heads(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if bias is None:
        return None
    key_heads = key.shape[1]
    return bias.expand(key_heads, query.shape[1] // key_heads, -1, -1)


KERNELS: Final = {
    "math": Kernel(_math_forward, _math_backward),
    "cpu": Kernel(_cpu_forward, _cpu_backward),
    "efficient": Kernel(_efficient_forward, _efficient_backward),
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
}
"""By name: any device, every score at hand; CPUs; CUDA devices."""
