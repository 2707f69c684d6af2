"""Adapters of peft in the model that trains: every linear has one that matters, or the model is refused by name."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn

from llamapro.errors import ModelRefused, UserError
from llamapro.expansion.kinds import build_without_weights
from llamapro.modeling.build import build_model
from llamapro.modeling.compiled import CompileChoice, compile_model
from llamapro.modeling.lora import adapter_targets, adapter_tensors, holds_transposed, merged_weight, require_peft
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.recompute import recompute_blocks
from llamapro.modeling.trainable import Adapters, TrainableSet
from tests.modeling.test_kept import OVERRIDES
from tests.support.families import MIXTURES, OLDER, POST_NORM, PRE_NORM, VOCABULARY, TinyFamily
from tests.support.modeling import CPU, packed_rows, plain_loss, plain_model, ready_model
from tests.support.models import save_tiny_llama

RANK, ALPHA = 3, 6.0
BLOCKS = (1, 3)
LENGTHS = [[7, 9], [16]]
ROWS = packed_rows(LENGTHS, ids=range(VOCABULARY))
# Their queries, keys and values are linears of a class of their own.
OWN_LINEARS = ("falcon", "falcon-new", "falcon-one-norm", "falcon-alibi")
MIXED = ("flex_olmo", "kolibri1", "afmoe")
FAMILIES = {row.name: row for row in PRE_NORM + POST_NORM + OLDER + MIXTURES}
REFUSED = [name for name in FAMILIES if name in (*OWN_LINEARS, *MIXED) or FAMILIES[name] in MIXTURES]
QUICK = ("llama", "gpt2", "gemma2", "phi3", "bloom", "cohere")
ADAPTED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES if name not in REFUSED
]


def saved(row: TinyFamily, folder: Path) -> Path:
    return row.save(folder, **OVERRIDES.get(row.name, {}))


def prefix_of(folder: Path) -> str:
    return ready_model(folder, TrainableSet.of(())).decoder_prefix


def adapted(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """The folder's model with adapters on two blocks, as a run begins."""
    targets = adapter_targets(build_without_weights(folder), prefix_of(folder), BLOCKS)
    trainable = TrainableSet.of_adapters(BLOCKS, Adapters(RANK, ALPHA, holds_transposed(targets)))
    return build_model(folder, dtype=dtype, device=CPU, trainable=trainable, record=None, seed=seed)


def randomize(model: LanguageModel) -> None:
    """Values with which every adapter matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and ".lora_" in name}


@pytest.mark.parametrize("name", ADAPTED)
def test_loss_and_gradients_are_those_of_peft_on_the_plain_model(tmp_path: Path, name: str) -> None:
    folder = saved(FAMILIES[name], tmp_path)
    model = adapted(folder)
    randomize(model)
    targets = adapter_targets(build_without_weights(folder), model.decoder_prefix, BLOCKS)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), fan_in_fan_out=holds_transposed(targets)
    )
    oracle = get_peft_model(plain_model(folder, attention="eager"), config)
    values = {f"base_model.model.{key.replace('.default', '')}": p for key, p in model.trainable_parameters()}
    assert set_peft_model_state_dict(oracle, values).unexpected_keys == []
    expected = plain_loss(oracle, ROWS, LENGTHS)
    loss = model(*ROWS).loss_sum
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    expected.backward()
    ours, theirs = gradients(model.hf), gradients(oracle.base_model.model)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(targets)
    for key, gradient in ours.items():
        assert gradient.any(), key
        assert torch.allclose(gradient, theirs[key], rtol=1e-3, atol=1e-4 * float(theirs[key].abs().max())), key
    others = [key for key, p in model.hf.named_parameters() if p.grad is not None and ".lora_" not in key]
    assert others == []


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_with_other_matrices_are_refused_by_name(tmp_path: Path, name: str) -> None:
    row = FAMILIES[name]
    row.config(**OVERRIDES.get(name, {})).save_pretrained(tmp_path)
    hf = build_without_weights(tmp_path)
    blocks = [key for key, module in hf.named_modules() if isinstance(module, nn.ModuleList) and len(module) == 6]
    with pytest.raises(ModelRefused, match=rf"in block \d of {type(hf).__name__} .* belongs to none"):
        adapter_targets(hf, f"{blocks[0]}.", range(6))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("lora") / "base", blocks=4)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_the_seed(base: Path) -> None:
    first, again, other = (adapted(base, seed=seed) for seed in (1, 1, 2))
    plain = plain_model(base)
    ids, positions = ROWS[0], ROWS[2]
    assert torch.equal(first.logits(ids, positions), ready_model(base, TrainableSet.of(())).logits(ids, positions))
    assert float(first(*ROWS).loss_sum) == pytest.approx(float(plain_loss(plain, ROWS, LENGTHS)), rel=1e-6)
    drawn = [dict(model.trainable_parameters()) for model in (first, again, other)]
    for name, values in drawn[0].items():
        assert torch.equal(values, drawn[1][name])
        assert torch.equal(values, drawn[2][name]) == (".lora_B." in name)  # B begins as zero
    assert len({float(values.sum()) for name, values in drawn[0].items() if ".lora_A." in name}) == 7 * len(BLOCKS)


def test_drawing_leaves_the_process_own_random_numbers_alone(base: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    adapted(base)
    assert torch.equal(torch.rand(3), expected)


def test_stored_tensors_keep_their_names(base: Path) -> None:
    model = adapted(base, dtype=torch.bfloat16)
    stored = set(model.stored.names(name for name, _ in model.frozen_tensors()))
    assert stored == set(plain_model(base).state_dict())
    assert {tensor.dtype for _, tensor in model.trainable_parameters()} == {torch.bfloat16}
    pairs = adapter_tensors(model.trainable_tensors())
    assert len(pairs) == 7 * len(BLOCKS) and set(pairs) <= stored
    assert pairs["model.layers.3.mlp.up_proj.weight"].b == "model.layers.3.mlp.up_proj.lora_B.weight"


def test_recomputed_blocks_give_the_same_gradients(base: Path) -> None:
    found = []
    for chosen in ((), BLOCKS):
        model = adapted(base)
        randomize(model)
        recompute_blocks(model.blocks, chosen)
        model(*ROWS).loss_sum.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(base: Path) -> None:
    found = []
    for parts in ("nothing", "blocks"):
        model = adapted(base)
        randomize(model)
        compile_model(model, CompileChoice(parts, "the test says so"))
        for _ in range(2):  # the first pass is never compiled
            model.zero_grad()
            model(*ROWS).loss_sum.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        difference = float((gradient - found[1][name]).abs().max() / gradient.abs().max())
        assert difference < 1e-4, (name, difference)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_merged_weight_is_the_sum(transposed: bool) -> None:
    weight, a, b = torch.randn(6, 4), torch.randn(RANK, 4), torch.randn(6, RANK)
    expected = weight.double() + ALPHA / RANK * b.double() @ a.double()
    given = weight.t().contiguous() if transposed else weight.clone()
    found = merged_weight(given, a, b, Adapters(RANK, ALPHA, transposed))
    assert torch.allclose((found.t() if transposed else found).double(), expected, atol=1e-6)


def test_without_peft_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'llamapro\[lora\]'"):
        require_peft()
