"""The strength dial: exactly the base at 0, exactly the trained model at 1, the export's bits in between."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llamapro.evaluation.strength import COARSE_STEPS, HALVINGS, StrengthDial, dialled, largest_within
from llamapro.expansion.record import read_record
from llamapro.export.export import export
from llamapro.export.strength import StrengthRequest
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.trainable import TrainableSet
from tests.support.expansion import all_tensors
from tests.support.families import MIXTURES, OLDER, POST_NORM, PRE_NORM, TinyFamily
from tests.support.modeling import packed_rows, plain_logits, plain_model, ready_model
from tests.support.strengths import TrainedFamily, trained_family

ROWS = packed_rows([[11, 1, 12], [24]], ids=range(96))
NOTHING = TrainableSet.of(())
SHOWN = ("llama-biases", "gemma2", "olmo2", "glm4", "gpt2", "falcon-new", "mixtral", "gpt_oss", "qwen2_moe", "jetmoe")
ALL = PRE_NORM + POST_NORM + OLDER + MIXTURES


def family_rows() -> list[object]:
    """A row of each kind for every run of the tests, all of them in the slow ones."""
    return [pytest.param(row, id=row.name, marks=() if row.name in SHOWN else pytest.mark.slow) for row in ALL]


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(ROWS[0], ROWS[2])


def opened(trained: TrainedFamily, folder: Path) -> tuple[LanguageModel, StrengthDial]:
    record = read_record(folder)
    assert record is not None
    model = ready_model(folder, NOTHING, record=record)
    return model, StrengthDial(model, record)


@pytest.mark.parametrize("row", family_rows())
def test_ends_are_base_and_trained_model_and_between_them_memory_and_export_agree(
    row: TinyFamily, tmp_path: Path
) -> None:
    trained = trained_family(row, tmp_path)
    export(trained.checkpoint, tmp_path / "whole", model=trained.model)
    model, dial = opened(trained, tmp_path / "whole")
    whole, base = logits(model), logits(ready_model(trained.base, NOTHING))
    assert not torch.equal(whole, base)
    with dial.at(0.0):
        assert torch.equal(logits(model), base)
    with dial.at(1.0):
        assert torch.equal(logits(model), whole)
    export(trained.checkpoint, tmp_path / "part", model=trained.model, strength=StrengthRequest(0.3))
    part = logits(ready_model(tmp_path / "part", NOTHING, record=read_record(tmp_path / "part")))
    assert not torch.equal(part, whole) and not torch.equal(part, base)
    with dial.at(0.3):
        assert torch.equal(logits(model), part)
    assert torch.equal(logits(model), whole)
    scaled = [name for name, tensor in all_tensors(tmp_path / "part").items() if name in trained.record.zeroed]
    assert scaled and differing(tmp_path / "whole", tmp_path / "part") == set(scaled)


def differing(left: Path, right: Path) -> set[str]:
    before, after = all_tensors(left), all_tensors(right)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_block_at_0_is_a_bypassed_block_and_plain_transformers_sees_the_ends_too(name: str, tmp_path: Path) -> None:
    trained = trained_family(next(row for row in ALL if row.name == name), tmp_path)
    export(trained.checkpoint, tmp_path / "whole", model=trained.model)
    model, dial = opened(trained, tmp_path / "whole")
    first, second = dial.blocks
    with dial.at({first: 0.0}):
        single = logits(model)
    with model.bypassed([first]):
        assert torch.equal(logits(model), single)
    with dial.at({first: 0.0, second: 0.5}):
        assert not torch.equal(logits(model), single)
    request = StrengthRequest(0.0)
    export(trained.checkpoint, tmp_path / "none", model=trained.model, strength=request)
    found, expected = (plain_logits_of(folder) for folder in (tmp_path / "none", trained.base))
    assert torch.equal(found, expected)


def plain_logits_of(folder: Path) -> torch.Tensor:
    """By plain transformers. Every tensor is copied: in files they lie at other addresses, where kernels round
    otherwise."""
    model = plain_model(folder, attention=None).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        return plain_logits(model, ROWS[0], [[11, 1, 12], [24]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filling", [0.0, -1.0])
def test_a_dialled_tensor_is_one_rounding_away_from_the_line_between_its_ends(
    dtype: torch.dtype, filling: float
) -> None:
    values = torch.cat([torch.tensor([0.0, -0.0, 1e-6, -3.0]), torch.randn(500)]).to(dtype)
    assert dialled(values, filling, 1.0) is values
    zero = dialled(values, filling, 0.0)
    assert torch.equal(zero.view(torch.uint8), torch.full_like(values, filling).view(torch.uint8))
    half = dialled(values, filling, 0.375)
    exact = filling + 0.375 * (values.double() - filling)
    assert half.dtype == dtype
    facts = torch.finfo(dtype)
    smallest = facts.tiny * facts.eps + abs(filling) * facts.eps
    torch.testing.assert_close(half.double(), exact, rtol=facts.eps, atol=smallest)


@pytest.mark.parametrize(
    ("increase", "bound", "expected"),
    [
        (lambda s: 0.01 * s, 0.02, 1.0),
        (lambda s: 0.01 * s, 0.005, 0.5),
        (lambda s: 0.01 * s, 0.00631, 0.631),
        (lambda s: s * s - 0.6 * s, 0.0, 0.6),
        (lambda s: -0.1 if s < 0.02 else 1.0, 0.0, 0.02),
        (lambda s: s, -0.5, 0.0),
    ],
)
def test_the_largest_strength_within_a_bound_is_found_to_a_256th(
    increase: Callable[[float], float], bound: float, expected: float
) -> None:
    tried = []

    def measured(strength: float) -> float:
        tried.append(strength)
        return increase(strength)

    found = largest_within(measured, bound)
    assert expected - 1 / 256 <= found <= expected
    assert found == 0 or increase(found) <= bound
    assert len(tried) <= COARSE_STEPS + HALVINGS and 0.0 not in tried
