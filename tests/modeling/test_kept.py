"""What blocks keep for the backward pass is what the planner says, for every family and kind of block."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.modeling import blocks as blocks_module
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.shape import DecoderShape
from tests.support.families import MIXTURES, OLDER, POST_NORM, PRE_NORM, VOCABULARY, TinyFamily
from tests.support.modeling import packed_rows, ready_model

LENGTH = 64
TRAINED = TrainableSet.of([1, 3])
OVERRIDES: dict[str, dict[str, Any]] = {"youtu": {"pad_token_id": None}}
# No block has a window here: on the CPU a window is a mask, which kernels of GPUs don't need.
NO_WINDOWS = {"sliding_window": LENGTH}
# Values are narrower than keys: planned as wide as the kernels of GPUs need them, kept here as they are.
NARROW_VALUES = ("youtu", "minicpm3", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1", "mimo_v2_flash")
# A mask of its own, which these models are given, makes the CPU expand keys and values.
MORE_ON_CPU = ("nemotron", "stablelm", "stablelm-parallel", "falcon-new", "falcon-one-norm")
# Its code looks at values, so it can't be seen without them.
UNSEEN = ("jetmoe",)
ROWS = [row for row in PRE_NORM + POST_NORM + OLDER + MIXTURES if row.name not in UNSEEN]


def kept_by_blocks(model: LanguageModel) -> list[int]:
    """Bytes that each block keeps in the forward pass: of parameters and of what all are handed nothing."""
    totals = [0] * len(model.blocks)
    known = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        where = tensor.untyped_storage().data_ptr()
        if inside and where not in known:
            known[where] = tensor
            totals[inside[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    inside: list[int] = []
    with entering(model, inside, known), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(*packed_rows([[LENGTH]], ids=range(VOCABULARY))[::2])
    return totals


@contextmanager
def entering(model: LanguageModel, inside: list[int], known: dict[int, torch.Tensor]) -> Iterator[None]:
    """While it lasts, `inside` ends with the block at work, and `known` has what it was handed beside its input."""

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args[1:], *kwargs.values()]
        parts = [part for value in values for part in (value if isinstance(value, tuple | list) else (value,))]
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        known.update((tensor.untyped_storage().data_ptr(), tensor) for tensor in tensors)
        inside.append(index)

    handles = []
    for index, block in enumerate(model.blocks):
        before = block.register_forward_pre_hook(lambda _, a, k, index=index: enter(index, a, k), with_kwargs=True)
        handles += [before, block.register_forward_hook(lambda *_: inside.clear())]
    yield
    for handle in handles:
        handle.remove()


def tiny_folder(row: TinyFamily, folder: Path) -> Path:
    windows = NO_WINDOWS if "sliding_window" in row.settings else {}
    return row.save(folder, **OVERRIDES.get(row.name, {}), **windows)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_blocks_keep_what_is_planned(tmp_path: Path, row: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its hooks would hide what it doesn't replace; what it replaces is parts of parameters, which don't count.
    monkeypatch.setattr(blocks_module, "KeptByReference", lambda _: nullcontext())
    folder = tiny_folder(row, tmp_path)
    shape = DecoderShape.from_config(json.loads((folder / "config.json").read_text()))
    found = kept_by_blocks(ready_model(folder, TRAINED))
    assert found[0] == 0
    for block in range(2, 6):  # the input of block 1 needs no gradient, so it keeps a little less
        planned = shape.block_sizes[block].kept[4, TRAINED.includes(block)].at(LENGTH)
        ratio = planned * LENGTH / found[block]
        least, most = 0.5 if row.name in MORE_ON_CPU else 0.9, 1.1 if row.name in NARROW_VALUES else 1.03
        assert least < ratio < most, (block, ratio)


@pytest.mark.parametrize("name", UNSEEN)
def test_of_a_model_that_can_not_run_without_values_nothing_is_claimed(name: str) -> None:
    (row,) = [row for row in MIXTURES if row.name == name]
    shape = DecoderShape.from_config(json.loads(row.config().to_json_string()))
    assert all(not size.kept for size in shape.block_sizes)
