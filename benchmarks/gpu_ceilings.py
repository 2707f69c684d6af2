"""The fastest that a device multiplies matrices and attends at a model's shape: what training can't exceed."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.training_run import WORKLOADS, Workload
from llamapro.modeling.attention import AttentionNeeds, PackedDocuments, attend, choose_attention, pack_documents
from llamapro.modeling.flash import activate

SECONDS = {"cuda": 0.5, "cpu": 0.05}
ROWS = {"cuda": 6, "cpu": 2}
TERA = 1e12
TRAINERS = {"cuda": ("auto", "cudnn", "sdpa"), "cpu": ("auto", "math")}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def measure(device_name: str, shape: str) -> dict[str, Any]:
    """Rates of single matrix products and of attention; the best bf16 product is the matrix ceiling."""
    device, workload = torch.device(device_name), WORKLOADS[shape]
    rows = ROWS[device_name]
    matrices = list(_matrices(workload, rows * workload.sequence_length, device))
    bf16 = [row["tflops"] for row in matrices if row["dtype"] == "bf16"]
    return {
        "matrices": matrices,
        "attention": [*_attention(workload, rows, device), *_trainers_attention(workload, rows, device)],
        "matrix_flops": max(bf16) * TERA,
        "rows": rows,
    }


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the mean over as many as fit into a fixed time, after some to warm up."""
    for _ in range(3):
        work()
    _wait_for(device)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS[device.type]:
        for _ in range(5):
            work()
        _wait_for(device)
        calls += 5
    return (time.perf_counter() - started) / calls


def _matrices(workload: Workload, tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """The linears of a block, those on one input merged, and the head: forward and input gradient."""
    hidden, inner, words = (workload.sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden), (hidden, words))
    for width, result in shapes:
        flops = 2.0 * tokens * width * result
        inputs = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        gradients = torch.randn(tokens, result, device=device, dtype=torch.bfloat16)
        weight = torch.randn(result, width, device=device, dtype=torch.bfloat16)
        works: dict[str, Callable[[], Any]] = {
            "forward": lambda x=inputs, w=weight: x @ w.t(),  # type: ignore[misc]
            "input gradient": lambda g=gradients, w=weight: g @ w,  # type: ignore[misc]
        }
        for kind, work in works.items():
            rate = flops / seconds_of(work, device) / TERA
            name = f"bf16 {tokens} × {width} → {result}, {kind}"
            yield {"name": name, "dtype": "bf16", "tflops": rate}
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
            yield from _fp8(inputs, weight, flops, device)


def _fp8(inputs: torch.Tensor, weight: torch.Tensor, flops: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """One scale per row, or one for all; with and without fast accumulation."""
    codes, weights = (tensor.to(torch.float8_e4m3fn) for tensor in (inputs, weight))
    (tokens, width), result = inputs.shape, len(weight)
    scales = {
        "rowwise": (torch.ones(tokens, 1, device=device), torch.ones(1, result, device=device)),
        "tensorwise": (torch.ones((), device=device), torch.ones((), device=device)),
    }
    for scaling, (left, right) in scales.items():
        for fast in (True, False):
            name = f"fp8 {tokens} × {width} → {result}, {scaling}, {'fast' if fast else 'exact'} accumulation"

            def work(left: Any = left, right: Any = right, fast: bool = fast) -> Any:
                return torch._scaled_mm(
                    codes, weights.t(), scale_a=left, scale_b=right, out_dtype=torch.bfloat16, use_fast_accum=fast
                )

            yield {"name": name, "dtype": "fp8", **_rate_or_failure(work, flops, device)}


def _attention(workload: Workload, rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Causal attention, forward and backward, with the FLOPs of half the square."""
    heads, length = workload.sizes["num_attention_heads"], workload.sequence_length
    width = workload.sizes["hidden_size"] // heads
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(rows, heads, length, width, **options) for _ in range(3))
    forward = 2.0 * rows * heads * length * length * width
    upstream = torch.randn_like(query)
    names = [name for name in BACKENDS if device.type == "cuda" and name != "math"] or ["math", "torch's choice"]
    for name in names:

        def attend(name: str = name) -> torch.Tensor:
            with sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext():
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        def both(attend: Callable[[], torch.Tensor] = attend) -> None:
            attend().backward(upstream)

        shape = f"({rows}, {heads}, {length}, {width})"
        yield {"name": f"attention {name} {shape}, forward", **_rate_or_failure(attend, forward, device)}
        yield {"name": f"attention {name} {shape}, both", **_rate_or_failure(both, 3.5 * forward, device)}


def _trainers_attention(workload: Workload, rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """The kernels that the trainer chooses among, called as it calls them: rows of one document each."""
    heads, length = workload.sizes["num_attention_heads"], workload.sequence_length
    width = workload.sizes["hidden_size"] // heads
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(rows, heads, length, width, **options) for _ in range(3))
    positions = torch.arange(length, device=device).expand(rows, -1)
    flops = 2.0 * rows * heads * length * length * width
    for requested in TRAINERS[device.type]:
        choice = choose_attention(requested, device, torch.bfloat16, AttentionNeeds(width))
        if choice.flash is not None:
            activate(choice.flash)
        documents = pack_documents(positions, choice)

        def both(documents: PackedDocuments = documents) -> None:
            output, _ = attend(torch.nn.Identity(), query, key, value, None, documents=documents)
            output.sum().backward()

        name = f"attention of the trainer, {requested}: {choice.name} ({choice.reason}), both"
        yield {"name": name, **_rate_or_failure(both, 3.5 * flops, device)}


def _rate_or_failure(work: Callable[[], Any], flops: float, device: torch.device) -> dict[str, Any]:
    """A kernel that this machine or this torch hasn't is noted as such."""
    try:
        return {"tflops": flops / seconds_of(work, device) / TERA}
    except (RuntimeError, ValueError) as error:
        return {"failed": str(error).splitlines()[0][:100]}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
