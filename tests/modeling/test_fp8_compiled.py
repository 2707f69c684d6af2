"""Compiled blocks with frozen weights in FP8: one graph for each kind, and the same losses and gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from llamapro.modeling.build import build_model
from llamapro.modeling.compiled import BLOCKS, CompileChoice, compile_model
from llamapro.modeling.fp8 import quantize_linears
from llamapro.modeling.linear import freeze_linears
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.recompute import recompute_blocks
from llamapro.modeling.trainable import TrainableSet
from tests.support.modeling import CPU, expanded_llama, packed_rows, ready_model

aten = torch.ops.aten
BATCHES = [[[40, 1, 23], [64]], [[40, 1, 23], [64]], [[10, 30, 24], [60, 4]], [[64], [64]]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated as always, but not turned into machine code."""
    real = torch.compile

    def captured_only(function: Any, **options: Any) -> Any:
        return real(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", captured_only)


def models(tmp_path: Path, count: int) -> tuple[list[LanguageModel], set[int]]:
    """Equal models of eight blocks with frozen weights in FP8, and the blocks that learn."""
    folder, record = expanded_llama(tmp_path, new_blocks=4)
    blocks = {block for block in record.new_blocks if block > 1}
    built = [
        build_model(
            folder,
            dtype=torch.bfloat16,
            device=CPU,
            trainable=TrainableSet.of(blocks),
            record=None,
            when_filled=quantize_linears,
        )
        for _ in range(count)
    ]
    return built, blocks


def results(model: LanguageModel) -> list[tuple[float, torch.Tensor]]:
    """Loss and whole gradient of every batch, the first of which runs uncompiled everywhere."""
    found = []
    for seed, lengths in enumerate(BATCHES):
        loss = model(*packed_rows(lengths, seed=seed)).loss_sum
        loss.backward()
        gradients = [parameter.grad for _, parameter in model.trainable_parameters()]
        found.append((loss.item(), torch.cat([gradient.flatten().float() for gradient in gradients])))
        for _, parameter in model.trainable_parameters():
            parameter.grad = None
    return found


@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize("recomputed", [set(), {3, 4, 5, 6, 7}])
def test_each_kind_of_block_is_one_graph_without_a_break(tmp_path: Path, recomputed: set[int]) -> None:
    (plain, compiled), _ = models(tmp_path, 2)
    compile_model(compiled, CompileChoice(BLOCKS, "test"))
    recompute_blocks(compiled.blocks, recomputed)
    for (expected, theirs), (loss, ours) in zip(results(plain), results(compiled), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    # Prefix, frozen, the lowest that learns (its input needs no gradient), those above it; and the loss.
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


class Projections(nn.Module):
    """Three layers with one input, as queries, keys and values have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 48, bias=False) for _ in range(3))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(states) for layer in self.layers)
        result: torch.Tensor = query * key + value
        return result


def test_a_compiled_block_casts_an_input_of_several_layers_once() -> None:
    casts: dict[str, int] = {}

    def counting(direction: str) -> Callable[[GraphModule, Any], Any]:
        def compiler(graph: GraphModule, _: Any) -> Any:
            values = [node.meta.get("val") for node in graph.graph.nodes if node.target is aten._to_copy.default]
            casts[direction] = sum(value.dtype == torch.float8_e4m3fn for value in values)
            return make_boxed_func(graph.forward)

        return compiler

    model = Projections().requires_grad_(False).to(torch.bfloat16)
    freeze_linears(model)
    quantize_linears(model)
    backend = aot_autograd(
        fw_compiler=counting("forward"),
        bw_compiler=counting("backward"),
        partition_fn=min_cut_rematerialization_partition,  # the machine code's own, which joins equal operations
    )
    rows = torch.randn(2, 5, 64).to(torch.bfloat16).requires_grad_()
    torch.compile(model, backend=backend, fullgraph=True)(rows).sum().backward()
    assert casts == {"forward": 1, "backward": 3}


@pytest.mark.slow
def test_machine_code_is_as_near_to_float32_as_the_plain_path(tmp_path: Path) -> None:
    """It rounds states to bf16 less often, so single codes differ."""
    (plain, compiled), blocks = models(tmp_path, 2)
    exact = ready_model(tmp_path / "expanded", TrainableSet.of(blocks))
    compile_model(compiled, CompileChoice(BLOCKS, "test"))
    for (truth, whole), (_, theirs), (loss, ours) in zip(*map(results, (exact, plain, compiled)), strict=True):
        assert loss == pytest.approx(truth, rel=0.01)
        assert (ours - whole).norm() < 1.1 * (theirs - whole).norm()
