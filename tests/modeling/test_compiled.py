"""Compiled models compute what others do, in one graph for each kind of block, whatever documents a batch has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from llamapro.errors import UserError
from llamapro.modeling.blocks import uncompiled
from llamapro.modeling.compiled import BLOCKS, NOTHING, CompileChoice, choose_compile, compile_model
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.recompute import recompute_blocks
from llamapro.modeling.trainable import TrainableSet
from tests.support.families import MIXTURES, OLDER, POST_NORM, PRE_NORM, VOCABULARY, TinyFamily
from tests.support.modeling import CPU, expanded_llama, packed_rows, ready_model

CUDA = torch.device("cuda")
BATCHES = [[[40, 1, 23], [64]], [[10, 30, 24], [60, 4]], [[64], [64]], [[1] * 64, [32, 32]]]
FAMILIES = {row.name: row for row in PRE_NORM + POST_NORM + OLDER + MIXTURES}
TRAINED = TrainableSet.of([1, 3])


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


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gradients(model: LanguageModel, lengths: list[list[int]], seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(*packed_rows(lengths, seed=seed, ids=range(VOCABULARY))).loss_sum
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.trainable_parameters() if parameter.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.item(), found


def assert_equal_training(plain: LanguageModel, compiled: LanguageModel, bound: float) -> None:
    """Of all batches, the first of which runs uncompiled everywhere."""
    for seed, lengths in enumerate([BATCHES[0], *BATCHES]):
        (expected, theirs), (loss, ours) = (gradients(model, lengths, seed) for model in (plain, compiled))
        assert loss == pytest.approx(expected, rel=bound)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            scale = theirs[name].float().norm()
            assert (ours[name].float() - theirs[name].float()).norm() <= bound * scale, name


def test_losses_and_gradients_are_those_of_the_plain_path(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    plain, compiled = (ready_model(folder, TrainableSet.of(record.new_blocks)) for _ in range(2))
    compile_model(compiled, CompileChoice(BLOCKS, "test"))
    assert_equal_training(plain, compiled, 2e-6)


def test_in_bf16_gradients_are_as_near_to_float32_as_those_of_the_plain_path(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    trainable = TrainableSet.of(record.new_blocks)
    exact, plain, compiled = (
        ready_model(folder, trainable, dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    compile_model(compiled, CompileChoice(BLOCKS, "test"))
    gradients(compiled, BATCHES[0], 0)
    losses, found = zip(*(gradients(model, BATCHES[1], 1) for model in (exact, plain, compiled)), strict=True)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)
    wholes = [torch.cat([gradient.float().flatten() for gradient in each.values()]) for each in found]
    theirs, ours = ((whole - wholes[0]).norm() for whole in wholes[1:])
    assert 0 < ours < 1.1 * theirs


@pytest.mark.usefixtures("quick_backend")
def test_each_kind_of_block_is_one_graph_whatever_the_documents_are(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path, new_blocks=4)
    model = ready_model(folder, TrainableSet.of([block for block in record.new_blocks if block > 1]))
    compile_model(model, CompileChoice(BLOCKS, "test"))
    for seed, lengths in enumerate([BATCHES[0], *BATCHES]):
        gradients(model, lengths, seed)
    # Prefix, frozen, the lowest that learns (its input needs no gradient), those above it; and the loss.
    assert graphs() == 5
    assert not counters["graph_break"]


@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize(
    "name",
    ["qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite", "gpt2"],
)
def test_dense_families_compile_without_a_break(tmp_path: Path, name: str) -> None:
    folder = FAMILIES[name].save(tmp_path)
    plain, compiled = (ready_model(folder, TRAINED) for _ in range(2))
    compile_model(compiled, CompileChoice(BLOCKS, "test"))
    assert_equal_training(plain, compiled, 1e-5)
    assert not counters["graph_break"]
    before = graphs()
    gradients(compiled, [[5] * 10 + [14], [63, 1]], 9)
    assert graphs() == before


@pytest.mark.usefixtures("quick_backend")
def test_compiled_blocks_can_be_computed_again(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    kept, again = (ready_model(folder, TrainableSet.of(record.new_blocks)) for _ in range(2))
    for model in (kept, again):
        compile_model(model, CompileChoice(BLOCKS, "test"))
    recompute_blocks(again.blocks, {3, 4, 5})
    assert_equal_training(kept, again, 0.0)


@pytest.mark.usefixtures("quick_backend")
def test_held_out_text_is_scored_uncompiled(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    plain, compiled = (ready_model(folder, TrainableSet.of(record.new_blocks)) for _ in range(2))
    compile_model(compiled, CompileChoice(BLOCKS, "test"))
    gradients(compiled, BATCHES[0], 0)
    rows = packed_rows(BATCHES[1])
    with torch.no_grad():
        assert torch.equal(compiled.hidden_states(*rows[::2]), plain.hidden_states(*rows[::2]))
    with uncompiled(compiled.blocks):
        assert all(block.compiled is None for block in compiled.blocks)
    assert all(block.compiled is not None for block in compiled.blocks)


@pytest.mark.usefixtures("quick_backend")
def test_a_compiled_block_keeps_no_more_than_another(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    bytes_kept: list[int] = []
    for parts in (NOTHING, BLOCKS):
        model = ready_model(folder, TrainableSet.of(record.new_blocks))
        compile_model(model, CompileChoice(parts, "test"))
        gradients(model, BATCHES[0], 0)
        known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        bytes_kept.append(0)

        def pack(tensor: torch.Tensor, known: set[int] = known) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                known.add(tensor.untyped_storage().data_ptr())
                bytes_kept[-1] += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*packed_rows(BATCHES[1])).loss_sum.backward()
    assert 0 < bytes_kept[1] <= bytes_kept[0]


def test_what_can_not_be_compiled_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ready_model(FAMILIES["qwen2"].save(tmp_path / "dense"), TRAINED)
    experts = ready_model(FAMILIES["mixtral"].save(tmp_path / "experts"), TRAINED)
    own = ready_model(own_attention().save(tmp_path / "own"), TRAINED)
    assert choose_compile("off", dense, CPU) == CompileChoice(NOTHING, "asked for: off")
    assert choose_compile("on", dense, CPU).parts == BLOCKS
    assert "on CPUs" in choose_compile("auto", dense, CPU).reason
    for model, reason in ((experts, "chooses experts"), (own, "mask between documents")):
        assert reason in choose_compile("auto", model, CPU).reason
        with pytest.raises(UserError, match=f"engine.compile: on can't be done: .*{reason}"):
            choose_compile("on", model, CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        choose_compile("on", dense, CPU)


def own_attention() -> TinyFamily:
    return FAMILIES["stablelm"]


def test_on_a_gpu_it_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ready_model(FAMILIES["qwen2"].save(tmp_path), TRAINED)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_compile("auto", dense, CUDA).parts == BLOCKS
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_compile("auto", dense, CUDA) == CompileChoice(NOTHING, "triton is not installed")
