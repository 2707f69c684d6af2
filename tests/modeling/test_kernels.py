"""Attention kernels of one document, alone and as torch's operation over many, against scores written out."""

import pytest
import torch
from torch import Tensor

from llamapro.modeling.by_document import attend_by_document
from llamapro.modeling.kernels import visible

BOUNDARIES = torch.tensor([0, 9, 10, 10, 45, 64], dtype=torch.int32)  # one of one token, one of none
SCALE = 0.31
RUNS = [("math", "cpu"), ("cpu", "cpu")]
RUNS += [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("math", "efficient", "cudnn")]


def states(value_width: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(64, 6, 8), (64, 2, 8), (64, 2, value_width)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def written_out(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, window: int | None, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Everything at once in float64: a mask keeps documents apart."""
    heads = query.shape[1]
    document = torch.bucketize(torch.arange(64), BOUNDARIES[1:].long(), right=True)
    seen = visible(64, window, query.device) & (document[:, None] == document[None]).to(query.device)
    q, k, v = query.double(), *(part.double().repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    scores = torch.einsum("qhw,khw->hqk", q, k) * SCALE
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, 64, 1)], dim=-1)
    output = torch.einsum("hqk,khw->qhw", torch.softmax(scores, -1)[..., :64], v)
    return output, torch.logsumexp(scores, -1)


def attend(
    kernel: str, tensors: list[Tensor], sinks: Tensor | None, window: int | None, cap: float | None
) -> tuple[Tensor, Tensor]:
    output, sums = attend_by_document(*tensors, sinks, BOUNDARIES.to(tensors[0].device), kernel, SCALE, window, cap)
    return output, sums


@pytest.mark.parametrize(("kernel", "device"), RUNS)
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("value_width", [8, 5])
def test_output_sums_and_gradients_equal_scores_written_out(
    kernel: str, window: int | None, value_width: int, device: str
) -> None:
    if kernel == "cudnn" and (window == 5 or value_width == 5):
        pytest.skip("cuDNN is given no windows")
    dtype = torch.bfloat16 if kernel == "cudnn" else torch.float32
    bound = 2e-2 if kernel == "cudnn" else 2e-5
    ours, theirs = (states(value_width, dtype, device) for _ in range(2))
    output, sums = attend(kernel, ours, None, window, None)
    expected, expected_sums = written_out(*theirs, None, window, None)
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=bound, atol=bound)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(device)
    output.backward(upstream.to(dtype))
    expected.backward(upstream.double())
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_caps_and_sinks_have_their_gradients(cap: float | None, with_sinks: bool) -> None:
    ours, theirs = states(), states()
    mine, reference = (torch.linspace(-1, 2, 6).requires_grad_() if with_sinks else None for _ in range(2))
    output, _ = attend("math", ours, mine, 11, cap)
    expected, _ = written_out(*theirs, reference, 11, cap)
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    pairs = [*zip(ours, theirs, strict=True), *([(mine, reference)] if with_sinks else [])]
    for tensor, exact in pairs:
        assert tensor is not None and exact is not None and tensor.grad is not None and exact.grad is not None
        torch.testing.assert_close(tensor.grad, exact.grad, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", ["math", "cpu"])
def test_it_is_a_well_formed_operation_of_torch(kernel: str) -> None:
    torch.library.opcheck(attend_by_document, (*states(), None, BOUNDARIES, kernel, SCALE, 5, None))


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_square_of_a_document() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tensors = states()
        attend("math", tensors, None, None, 2.0)
    inputs = sum(tensor.nbytes for tensor in tensors)
    output, sums = 64 * 6 * 8 * 4, 64 * 6 * 4
    assert sum(kept) == inputs + output + sums + BOUNDARIES.nbytes


def test_fused_kernels_never_leave_out_a_cap_or_sinks_silently() -> None:
    with pytest.raises(AssertionError, match="math kernel"):
        attend("cpu", states(), torch.ones(6), None, None)
    with pytest.raises(AssertionError, match="math kernel"):
        attend("cpu", states(), None, None, 30.0)
