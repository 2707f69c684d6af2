"""What compiled blocks keep is what the planner counts for fused kernels, and the scales of their two norms."""

from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from llamapro.modeling import blocks as blocks_module
from llamapro.modeling.compiled import BLOCKS, CompileChoice, compile_model
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.activations import fused_frozen_block_bytes, fused_trainable_block_bytes
from llamapro.planning.shape import DecoderShape
from tests.support.modeling import expanded_llama, packed_rows, ready_model

LENGTH = 64
NORM_SCALES = 2 * 4


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are cut into forward and backward as for real kernels, and run operation by operation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch._dynamo.reset()


@pytest.mark.usefixtures("partitioned")
def test_compiled_blocks_keep_the_inputs_of_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, record = expanded_llama(tmp_path)
    model = ready_model(folder, TrainableSet.of(record.new_blocks), torch.bfloat16)
    compile_model(model, CompileChoice(BLOCKS, "test"))
    rows = packed_rows([[LENGTH]])
    for _ in range(2):
        model(*rows).loss_sum.backward()
    kept = kept_by_blocks(model, rows, monkeypatch)
    shape = DecoderShape.from_config(orjson.loads((folder / "config.json").read_bytes()))
    frozen, trainable = (what(shape, 2) for what in (fused_frozen_block_bytes, fused_trainable_block_bytes))
    assert (kept[3], kept[5]) == (frozen + NORM_SCALES, trainable + NORM_SCALES)
    assert 0 not in kept and 1 not in kept


def kept_by_blocks(
    model: LanguageModel, rows: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> dict[int, float]:
    """Bytes per token that each block keeps, parameters and what all are handed apart."""
    known = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, float] = {}
    inside: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside and tensor.untyped_storage().data_ptr() not in known:
            known[tensor.untyped_storage().data_ptr()] = tensor
            kept[inside[-1]] = kept.get(inside[-1], 0.0) + tensor.untyped_storage().nbytes() / LENGTH
        return tensor

    def counting(*_: Any) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    monkeypatch.setattr(blocks_module, "KeptByReference", counting)
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: inside.append(index))
        block.register_forward_hook(lambda *_: inside.clear())
    with counting():
        model(*rows)
    return kept
