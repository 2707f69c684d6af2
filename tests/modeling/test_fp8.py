"""Frozen linears in FP8: every rounding bounded against float64, gradients, nothing kept, every family."""

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from llamapro.modeling import fp8
from llamapro.modeling.build import build_model
from llamapro.modeling.fp8 import (
    FP8Linear,
    dequantized,
    describe_fp8,
    fp8_linear,
    quantize_linears,
    quantize_rows,
    quantized_parameters,
    quantized_tensors,
    scaled_product,
)
from llamapro.modeling.linear import freeze_linears
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.recompute import recompute_blocks
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.fp8_weights import saved_bytes
from llamapro.planning.memory import estimate_memory
from llamapro.planning.shape import DecoderShape, Learning
from tests.support.families import HYBRID, TINY_FAMILIES, TinyFamily
from tests.support.modeling import CPU, packed_rows

CODES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
# Half the distance between neighbours: relative where codes are normal numbers, of the scale below.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10
BF16_ROUNDING = 2.0**-8
FLOAT32_SUMS = 1e-5
# FP8 units add up in fewer bits than float32 has.
HOPPER_SUMS = 2.0**-10
TRAINED = (2, 4)
# Falcon's linear layers are of a class of its own; XGLM adds float32 positions, which bf16 norms on CPUs don't take.
WITHOUT_FP8 = ("falcon", "xglm")
TRAINABLE = [row for row in TINY_FAMILIES if row not in HYBRID]
WITH_FP8 = [row for row in TRAINABLE if row.model_type not in WITHOUT_FP8]


def random_rows(rows: int = 24, width: int = 160, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, width, generator=generator) * torch.logspace(-12, 6, rows).unsqueeze(1)
    values[:, 3] *= 300
    return values.to(dtype)


def quantized(outputs: int = 48, inputs: int = 64, bias: bool = True) -> tuple[FP8Linear, torch.Tensor]:
    """A layer, and the bf16 weight that it was made from."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(torch.bfloat16)
    linear.weight.data *= torch.logspace(-2, 1, outputs).unsqueeze(1).to(torch.bfloat16)
    weight = linear.weight.detach().clone()
    layers = nn.ModuleList([linear])
    freeze_linears(layers)
    quantize_linears(layers)
    (layer,) = layers
    assert isinstance(layer, FP8Linear)
    return layer, weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_is_the_nearest_there_is(dtype: torch.dtype) -> None:
    values = random_rows(dtype=dtype)
    codes, scales = quantize_rows(values)
    assert codes.is_contiguous() and codes.dtype == torch.float8_e4m3fn and scales.shape == (24, 1)
    table = CODES[~CODES.float().isnan()].double()
    for row, code, scale in zip(values.double(), codes.double(), scales.double(), strict=True):
        found = (row - code * scale).abs()
        nearest = (row.unsqueeze(1) - table * scale).abs().amin(1)
        assert (found <= nearest * (1 + 1e-5) + 1e-7 * row.abs()).all()
        assert (found <= torch.maximum(RELATIVE * row.abs(), ABSOLUTE * scale) * (1 + 1e-5)).all()


def test_the_largest_of_each_row_takes_the_largest_code() -> None:
    values = random_rows()
    codes, scales = quantize_rows(values)
    largest = values.abs().argmax(1, keepdim=True)
    assert (codes.float().gather(1, largest).abs() == 448).all()
    torch.testing.assert_close(scales * 448, values.abs().amax(1, keepdim=True).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-37, 3e38])
def test_zeros_and_extremes_stay_what_they_are(magnitude: float) -> None:
    values = torch.full((3, 16), magnitude)
    values[1, ::2] = 0
    codes, scales = quantize_rows(values)
    assert scales.isfinite().all() and (scales > 0).all()
    back = dequantized(codes, scales)
    assert back.isfinite().all()
    assert (back - values).abs().max() <= max(RELATIVE * magnitude, 2.0**-126)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_never_becomes_finite(bad: float, dtype: torch.dtype) -> None:
    layer, _ = quantized()
    rows = torch.randn(4, 64).to(dtype)
    rows[2, 7] = bad
    output = fp8_linear(rows, layer.codes, layer.scales, layer.bias)
    assert output[[0, 1, 3]].isfinite().all()
    assert output[2].isnan().all()


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    layer, _ = quantized()
    rows = torch.randn(4, 64).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(4, 48).to(torch.bfloat16)
    upstream[1, 5] = torch.inf
    layer(rows).backward(upstream)
    assert rows.grad is not None
    assert rows.grad[1].isnan().all() and rows.grad[[0, 2, 3]].isfinite().all()


def test_forward_is_the_product_with_the_dequantized_weight_within_the_rounding_of_tokens() -> None:
    layer, weight = quantized()
    rows = random_rows(width=64)[8:20]
    held = dequantized(layer.codes, layer.scales).double()
    assert (held - weight.double()).abs().max() <= RELATIVE * weight.abs().max()
    scales = quantize_rows(rows)[1].double()
    expected = rows.double() @ held.t()
    rounding = torch.maximum(RELATIVE * rows.double().abs(), ABSOLUTE * scales) @ held.abs().t()
    assert layer.bias is not None
    expected += layer.bias.double()
    found = layer(rows).double()
    assert ((found - expected).abs() <= rounding + BF16_ROUNDING * (expected.abs() + rounding)).all()


def test_the_input_gradient_is_that_of_the_dequantized_weight_within_the_rounding_of_gradients() -> None:
    layer, _ = quantized()
    rows = torch.randn(12, 64).to(torch.bfloat16).requires_grad_()
    upstream = random_rows(width=48)[8:20]
    layer(rows).backward(upstream)
    codes, outputs = layer.codes.double(), layer.scales.double().t()
    scaled = upstream.double() * outputs
    rounding = torch.maximum(RELATIVE * scaled.abs(), ABSOLUTE * scaled.abs().amax(1, keepdim=True) / 448) @ codes.abs()
    expected = upstream.double() @ dequantized(layer.codes, layer.scales).double()
    assert rows.grad is not None
    difference = (rows.grad.double() - expected).abs()
    assert (difference <= 1.01 * rounding + BF16_ROUNDING * (expected.abs() + rounding)).all()


def test_what_codes_can_hold_gives_the_exact_product_and_gradient() -> None:
    """Powers of two and small integers: any scale left out, or put in twice, shows."""
    generator = torch.Generator().manual_seed(1)
    powers = 2.0 ** torch.randint(-6, 6, (32, 1), generator=generator)
    weight = torch.randint(-7, 8, (32, 16), generator=generator).float()
    weight[:, 0] = 7
    codes, scales = quantize_rows(weight * powers * 64)  # 7 · 64 is 448, so that scales are powers of two
    rows = torch.randint(-7, 8, (5, 16), generator=generator).to(torch.bfloat16)
    rows[:, 1] = 7
    rows.requires_grad_()
    output = fp8_linear(rows, codes, scales, None)
    assert torch.equal(output, (rows.double() @ (weight * powers * 64).double().t()).to(torch.bfloat16))
    upstream = torch.randint(-7, 8, (5, 32), generator=generator).float() / scales.t()
    upstream[:, 2] = 7 / scales[2]
    output.backward(upstream.to(torch.bfloat16))
    assert rows.grad is not None
    expected = upstream.double() @ (weight * powers * 64).double()
    assert torch.equal(rows.grad, expected.to(torch.bfloat16))


def test_results_are_near_those_of_bf16() -> None:
    layer, weight = quantized(bias=False)
    rows = torch.randn(64, 64).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(64, 48).to(torch.bfloat16)
    output = layer(rows)
    output.backward(upstream)
    assert rows.grad is not None
    for found, expected in ((output, rows @ weight.t()), (rows.grad, upstream @ weight)):
        assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_gpt2s_layer_does_the_same() -> None:
    layer, weight = quantized()
    conv = Conv1D(48, 64).requires_grad_(False).to(torch.bfloat16)
    conv.weight.data, conv.bias.data = weight.t().contiguous(), layer.bias.data.clone()  # type: ignore[union-attr]
    layers = nn.ModuleList([conv])
    freeze_linears(layers)
    quantize_linears(layers)
    assert torch.equal(layers[0].codes.view(torch.uint8), layer.codes.view(torch.uint8))  # type: ignore[operator]
    rows = torch.randn(2, 5, 64).to(torch.bfloat16)
    assert torch.equal(layers[0](rows), layer(rows))


def test_the_bf16_weight_is_gone_and_nothing_is_stored() -> None:
    linear = nn.Linear(64, 48).requires_grad_(False).to(torch.bfloat16)
    weight, layers = linear.weight, nn.ModuleList([linear])
    freeze_linears(layers)
    quantize_linears(layers)
    assert weight.untyped_storage().nbytes() == 0
    assert dict(layers.named_parameters()).keys() == layers.state_dict().keys() == {"0.bias"}
    assert quantized_tensors(layers).keys() == {"0.codes", "0.scales"}
    assert quantized_parameters(layers) == ["0.weight"]
    held = sum(tensor.nbytes for tensor in quantized_tensors(layers).values())
    assert 2 * 64 * 48 - held == saved_bytes(nn.ModuleList([nn.Linear(64, 48)])) == 64 * 48 - 4 * 48


def test_the_result_may_be_changed_in_place() -> None:
    """As OLMo does with its queries, keys and values."""
    layer, _ = quantized()
    rows = torch.randn(2, 5, 64).to(torch.bfloat16).requires_grad_()
    layer(rows).clamp_(min=0).sum().backward()
    plain = rows.detach().clone().requires_grad_()
    layer(plain).clamp(min=0).sum().backward()
    assert rows.grad is not None and plain.grad is not None and torch.equal(rows.grad, plain.grad)


def kept_by(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """What autograd keeps; of a compiled function too."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(rows)
    return kept


def test_nothing_is_kept_for_the_backward_pass() -> None:
    layer, weight = quantized()
    rows = torch.randn(2, 5, 64).to(torch.bfloat16).requires_grad_()
    assert kept_by(layer, rows) == []
    assert kept_by(lambda states: states @ weight.t(), rows)  # a weight beside a layer would be seen


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_share_one_graph_and_keep_what_lies_between_layers_only(backend: str) -> None:
    def block(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 64))
        layers.requires_grad_(False).to(torch.bfloat16)
        freeze_linears(layers)
        quantize_linears(layers)
        return layers

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(nn.Sequential.forward, backend=counter, dynamic=False, fullgraph=True)
    rows = torch.randn(2, 5, 64).to(torch.bfloat16).requires_grad_()
    plain = rows.detach().clone().requires_grad_()
    for layers in (block(0), block(1), block(2)):
        kept = kept_by(lambda states, layers=layers: compiled(layers, states), rows)  # type: ignore[misc]
        assert [tuple(tensor.shape) for tensor in kept] == [(2, 5, 48)]  # the activation function's input
        rows.grad = plain.grad = None
        output, expected = compiled(layers, rows), layers(plain)
        output.float().square().sum().backward()
        expected.float().square().sum().backward()
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
        assert rows.grad is not None and plain.grad is not None
        assert (rows.grad - plain.grad).norm() < 0.02 * plain.grad.norm()
    assert counter.frame_count == 1


def fp8_model(folder: Path, *trained: int) -> LanguageModel:
    """A bf16 model whose frozen linears are in FP8."""
    return build_model(
        folder,
        dtype=torch.bfloat16,
        device=CPU,
        trainable=TrainableSet.of(trained or TRAINED),
        record=None,
        when_filled=quantize_linears,
    )


def bf16_model(folder: Path) -> LanguageModel:
    return build_model(folder, dtype=torch.bfloat16, device=CPU, trainable=TrainableSet.of(TRAINED), record=None)


def gradients(model: LanguageModel) -> tuple[float, torch.Tensor]:
    loss = model(*packed_rows([[24, 1, 15], [40]], ids=range(3, 96))).loss_sum
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten().float() for _, parameter in model.trainable_parameters()])


@pytest.mark.parametrize("row", WITH_FP8, ids=lambda row: row.name)
def test_every_family_trains_nearly_as_in_bf16(row: TinyFamily, tmp_path: Path) -> None:
    """Nearly: a rounded state may send a token to another expert."""
    row.save(tmp_path)
    model = fp8_model(tmp_path)
    found, plain = gradients(model), gradients(bf16_model(tmp_path))
    assert found[0] == pytest.approx(plain[0], rel=0.05) and found[0] != plain[0]
    assert torch.cosine_similarity(found[1], plain[1], dim=0) > 0.5
    layers = [name for name, module in model.blocks.named_modules() if isinstance(module, FP8Linear)]
    assert layers and not {int(name.split(".")[0]) for name in layers} & set(TRAINED)


@pytest.mark.parametrize("row", [row for row in TRAINABLE if row.model_type == "falcon"], ids=lambda row: row.name)
def test_falcons_layers_stay_as_they_are(row: TinyFamily, tmp_path: Path) -> None:
    model = fp8_model(row.save(tmp_path))
    assert quantized_tensors(model) == {}
    assert gradients(model)[0] == gradients(bf16_model(tmp_path))[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon"])
def test_the_plan_knows_what_the_weights_take(family: str, tmp_path: Path) -> None:
    row = next(row for row in TINY_FAMILIES if row.name == family)
    model = fp8_model(row.save(tmp_path))
    shape = DecoderShape.from_config(orjson.loads((tmp_path / "config.json").read_bytes()))
    sizes = {"zero_stage": 1, "world_size": 1, "micro_tokens": 64, "sequence_length": 64}
    learning = Learning(frozenset(TRAINED))
    planned, plain = (
        estimate_memory(shape, learning, precision=precision, **sizes)  # type: ignore[arg-type]
        for precision in ("fp8-frozen", "bf16")
    )
    held = [*model.parameters(), *quantized_tensors(model).values()]
    assert planned.weights == sum(tensor.nbytes for tensor in held)
    assert (planned.weights < plain.weights) is (family != "falcon")


def test_recomputed_blocks_change_nothing(tmp_path: Path) -> None:
    next(row for row in TINY_FAMILIES if row.name == "llama").save(tmp_path)
    plain, recomputed = fp8_model(tmp_path), fp8_model(tmp_path)
    recompute_blocks(recomputed.blocks, [2, 3, 4, 5])
    expected, found = gradients(plain), gradients(recomputed)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "hunyuan_v1_moe", "jetmoe", "qwen2_moe"])
def test_experts_and_what_chooses_among_them_stay_in_bf16(family: str, tmp_path: Path) -> None:
    """16 experts, so that their number doesn't keep the layer that chooses from fitting."""
    row = next(row for row in TINY_FAMILIES if row.name == family)
    experts = "num_local_experts" if "num_local_experts" in row.settings else "num_experts"
    row.save(tmp_path, **{experts: 16})
    model = fp8_model(tmp_path)
    in_fp8 = [name for name, module in model.blocks.named_modules() if isinstance(module, FP8Linear)]
    assert in_fp8
    assert not [name for name in in_fp8 if any(word in name for word in ("router", "gate.", "experts"))]
    assert "of experts" in describe_fp8(model.blocks, model.trainable, CPU)


def test_operands_lie_as_the_gpus_operation_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of torch's own shape function of it, which needs no GPU, for the operands of both directions."""
    seen: list[tuple[torch.Tensor | None, ...]] = []

    def recorded(*operands: torch.Tensor | None) -> torch.Tensor:
        seen.append(operands)
        return scaled_product(*operands)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8, "scaled_product", recorded)
    layer, _ = quantized()
    rows = torch.randn(24, 64).to(torch.bfloat16).requires_grad_()
    layer(rows).backward(torch.randn(48, 24).to(torch.bfloat16).t())
    narrow = [*quantize_rows(rows[:, :40]), *quantize_rows(rows[:16, :40])]
    across = [*seen[0][:2], layer.codes.t().contiguous().t(), layer.scales]
    shapes = []
    with FakeTensorMode(), torch.no_grad():
        for operands in seen:
            output = scaled_product(*map(on_fake_gpu, operands))  # type: ignore[arg-type]
            shapes.append((tuple(output.shape), output.dtype, output.device.type))
        for wrong, reason in ((narrow, "divisible by 16"), (across, "column.major|col.major")):
            with pytest.raises(RuntimeError, match=reason):
                scaled_product(*map(on_fake_gpu, wrong))  # type: ignore[arg-type]
    assert shapes == [((24, 48), torch.bfloat16, "cuda"), ((24, 64), torch.bfloat16, "cuda")]


def on_fake_gpu(values: torch.Tensor | None) -> torch.Tensor | None:
    if values is None:
        return None
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_computes_what_the_cpu_emulates() -> None:
    rows, weight = random_rows(96, 512), torch.randn(128, 512).to(torch.bfloat16)
    left, right = quantize_rows(rows), quantize_rows(weight)
    on_gpu = [quantize_rows(values.cuda()) for values in (rows, weight)]
    for (codes, scales), (gpu_codes, gpu_scales) in zip((left, right), on_gpu, strict=True):
        assert torch.equal(codes.view(torch.uint8), gpu_codes.cpu().view(torch.uint8))
        assert torch.equal(scales, gpu_scales.cpu())
    expected = scaled_product(*left, *right).double()
    found = scaled_product(*on_gpu[0], *on_gpu[1]).cpu().double()
    summed = dequantized(*left).double().abs() @ dequantized(*right).double().abs().t()
    assert ((found - expected).abs() <= HOPPER_SUMS * summed + 2 * BF16_ROUNDING * expected.abs()).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpus_gradient_is_the_cpus() -> None:
    layer, _ = quantized(128, 512)
    rows, upstream = torch.randn(96, 512).to(torch.bfloat16), torch.randn(96, 128).to(torch.bfloat16)
    found = []
    for device in ("cpu", "cuda"):
        states = rows.to(device).requires_grad_()
        layer.to(device)(states).backward(upstream.to(device))
        assert states.grad is not None
        found.append(states.grad.cpu().double())
    held = dequantized(layer.cpu().codes, layer.scales).double()
    summed = upstream.double().abs() @ held.abs()
    assert ((found[1] - found[0]).abs() <= HOPPER_SUMS * summed + 2 * BF16_ROUNDING * found[0].abs()).all()
