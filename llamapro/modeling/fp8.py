"""Linear layers of frozen blocks with weights in FP8: one byte a weight, and matrix products at twice the bf16 rate.

A weight is quantized once, to E4M3 with one scale per output; an activation each time, with one scale per token. The
forward product is x₈ W₈ᵀ · (token scale × output scale). The input gradient is ∇x = ∇y W, a sum over outputs, so the
outputs' scales can't be taken out of it. They are multiplied into ∇y before that is quantized: (∇y · s)₈ W₈ is the
same in exact arithmetic, it is the gradient of what the forward pass computed, with the very same W₈, and its rounding
is relative to what each output contributes. FP8 units want both factors row by row along the summed dimension, so W₈ is
transposed for each backward product, which moves 2 bytes a weight; holding that copy instead would cost what bf16 does.

On the CPU the products are computed from the dequantized codes in float32, with the same scales and roundings.
"""

from typing import Any, Final, cast

import torch
from torch import nn

from llamapro.modeling.linear import FrozenConv1D, FrozenLinear, is_frozen_linear
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.fp8_weights import fp8_linears

CODE: Final = torch.float8_e4m3fn
LARGEST_CODE: Final = 448.0
# Rows whose values are all zero, or next to it, still need a scale to be divided by.
SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny


class FP8Linear(nn.Module):
    """y = x Wᵀ + b with an input gradient and no parameters but b. Made from a frozen linear by `quantize_linears`.

    Attributes:
        codes: (outputs, inputs) E4M3.
        scales: (outputs, 1) float32; W ≈ codes · scales.
        bias: (outputs,), or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, inputs) → (…, outputs), bf16."""
        rows = input.reshape(-1, input.shape[-1])
        return fp8_linear(rows, self.codes, self.scales, self.bias).view(*input.shape[:-1], self.codes.shape[0])


def quantize_linears(module: nn.Module) -> None:
    """Put the weights of frozen linear layers into FP8 in place, and free what they were.

    Codes and scales are buffers that no state holds: what is saved, exported and proved equal to the base are the
    weights of the model's folder. DeepSpeed would round scales that are parameters to bf16.
    """
    for _, linear in fp8_linears(module, (FrozenLinear, FrozenConv1D)):
        _quantize(linear)


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to E4M3 with a scale of its own, which takes its largest magnitude to 448.

    A row with an infinity or a NaN becomes NaN, in the codes or in the scale, and so does every product with it.

    Args:
        values: (rows, n), finite magnitudes from 2⁻¹²⁶ upward are kept.

    Returns:
        Codes (rows, n), contiguous, and float32 scales (rows, 1); values ≈ codes · scales.
    """
    scales = (values.abs().amax(dim=1, keepdim=True).float() / LARGEST_CODE).clamp(min=SMALLEST_SCALE)
    return (values / scales).to(CODE).contiguous(), scales


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values that codes stand for."""
    return codes.float() * scales


def fp8_linear(
    input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x Wᵀ + b for (tokens, inputs), differentiable in x only."""
    output: torch.Tensor = _FP8Linear.apply(input, codes, scales, bias)  # type: ignore[no-untyped-call]
    return output


def input_gradient(gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """∇y W, (tokens, inputs), for ∇y (tokens, outputs): the outputs' scales go into ∇y before it is quantized."""
    columns = codes.t().contiguous()
    ones = scales.new_ones(len(columns), 1)
    return scaled_product(*quantize_rows(gradient * scales.t()), columns, ones)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.codes, ctx.scales = codes, scales
        return scaled_product(*quantize_rows(input), codes, scales, bias)

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return input_gradient(output_gradients[0], ctx.codes, ctx.scales), None, None, None


def scaled_product(
    left: torch.Tensor,
    left_scales: torch.Tensor,
    right: torch.Tensor,
    right_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(left · left scales) (right · right scales)ᵀ + bias, in bf16.

    Args:
        left, right: (m, k) and (n, k) E4M3, contiguous; k and n multiples of 16.
        left_scales, right_scales: (m, 1) and (n, 1) float32.
    """
    if left.is_cuda:
        return torch._scaled_mm(
            left,
            right.t(),
            left_scales,
            right_scales.t(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    product = left.float() @ right.float().t() * left_scales * right_scales.t()
    return (product if bias is None else product + bias.float()).to(torch.bfloat16)


def quantized_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Codes and scales of every weight in FP8, by their names."""
    return {
        f"{name}.{buffer}": tensor
        for name, module in model.named_modules()
        if isinstance(module, FP8Linear)
        for buffer, tensor in module.named_buffers()
    }


def quantized_parameters(model: nn.Module) -> list[str]:
    """The names that the weights in FP8 had as parameters."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FP8Linear)]


def describe_fp8(blocks: nn.ModuleList, trainable: TrainableSet, device: torch.device) -> str:
    """Which matrices of frozen blocks are in FP8, which stayed in bf16, and how the products are computed."""
    frozen = [block for index, block in enumerate(blocks) if not trainable.includes(index)]
    modules = [module for block in frozen for module in block.modules()]
    quantized = [module.codes for module in modules if isinstance(module, FP8Linear)]
    others = [(module, weight) for module in modules for weight in _matrices(module)]
    experts = [weight for _, weight in others if weight.ndim > 2]
    linears = [weight for module, weight in others if weight.ndim == 2 and is_frozen_linear(module)]
    kinds = ((experts, "of experts"), (linears, "that are routers or have sizes not divisible by 16"))
    rest = [weight for module, weight in others if weight.ndim == 2 and not is_frozen_linear(module)]
    stayed = [f"{len(kind)} {what}" for kind, what in (*kinds, (rest, "in layers of other kinds")) if kind]
    how = "FP8 matrix units" if device.type == "cuda" else "emulated on the CPU in float32, slower than bf16"
    count, weights = len(quantized), sum(codes.numel() for codes in quantized)
    in_bf16 = f"; matrices left in bf16: {', '.join(stayed)}" if stayed else ""
    return f"{count} frozen matrices in FP8 (E4M3), {weights:,} weights; {how}{in_bf16}"


def _quantize(linear: nn.Module) -> None:
    weight = cast(nn.Parameter, linear._parameters.pop("weight"))
    assert weight.numel() and not weight.requires_grad, "a weight that is shared, or learns, can't be put into FP8"
    matrix = weight.detach().t() if isinstance(linear, FrozenConv1D) else weight.detach()
    codes, scales = quantize_rows(matrix)
    weight.data = weight.data.new_empty(0)  # whoever filled the model still knows the parameter
    linear.__class__ = FP8Linear
    linear.register_buffer("codes", codes, persistent=False)
    linear.register_buffer("scales", scales, persistent=False)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module._parameters.values() if weight is not None and weight.ndim > 1]
