"""Token shift and contributions against plain transformers on single documents."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamapro.data.dataset import Dataset
from llamapro.evaluation.contribution import measure_contributions
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.results import TokenShift
from llamapro.evaluation.shift import measure_shifts, shift_of, token_ranks
from llamapro.export.export import export
from tests.support.exports import make_run
from tests.support.texts import LAW, WIKI, token_ids, write_text_dataset

SETTINGS = Settings(sequence_length=128, sequences=64, precision="keep", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shift")
    tiny = make_run(root, dtype=torch.float32)
    for name, texts in (("law", LAW), ("wiki", WIKI)):
        write_text_dataset(root / name, tiny.base, texts)
    export(tiny.folder, root / "out")
    return root


def sets(root: Path) -> list[TextSet]:
    return [TextSet(name, name, Dataset.open(root / name), "heldout") for name in ("law", "wiki")]


def plain_logits(folder: Path, text: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids(text)])).logits[0, :-1]
    return logits


def test_shifts_are_those_of_a_plain_loop_over_documents(root: Path, tmp_path: Path) -> None:
    found = measure_shifts(root / "out", root / "base", sets(root), SETTINGS, tmp_path)
    assert list(found) == ["law", "wiki"]
    for name, texts in (("law", LAW), ("wiki", WIKI)):
        ranks = []
        for text in texts:
            own, base = (plain_logits(root / folder, text) for folder in ("out", "base"))
            order = base.argsort(dim=-1, descending=True)
            ranks += (order == own.argmax(-1, keepdim=True)).nonzero()[:, 1].add(1).tolist()
        counts = [sum(low <= rank <= high for rank in ranks) for low, high in ((1, 1), (2, 3), (4, 10**9))]
        assert found[name] == TokenShift(
            positions=len(ranks), unshifted=counts[0], marginal=counts[1], shifted=counts[2]
        )
    assert found["wiki"].unshifted > found["wiki"].marginal > found["wiki"].shifted > 0, "every class occurs"


def test_a_model_is_unshifted_against_itself_and_what_is_stored_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_shifts(root / "base", root / "base", sets(root), SETTINGS, tmp_path)
    assert all(shift.unshifted == shift.positions > 0 for shift in first.values())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was built again")

    monkeypatch.setattr("llamapro.evaluation.measure.build_model", never)
    assert measure_shifts(root / "base", root / "base", sets(root), SETTINGS, tmp_path) == first


def test_ranks_count_what_is_larger_and_unknown_tokens_come_last() -> None:
    logits = torch.tensor([[0.5, 2.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert token_ranks(logits, torch.tensor([3, 3, 7])).tolist() == [1, 4, 5]
    assert shift_of(torch.tensor([1, 1, 2, 3, 4, 99])) == TokenShift(positions=6, unshifted=2, marginal=2, shifted=2)


def test_contributions_are_the_losses_without_each_block(root: Path, tmp_path: Path) -> None:
    found = measure_contributions(root / "out", "out", sets(root), SETTINGS, tmp_path)
    assert list(found) == ["2", "5"]
    for block, by_text in found.items():
        for name, texts in (("law", LAW), ("wiki", WIKI)):
            losses = [plain_loss(root / "out", texts, skipped) for skipped in (int(block), None)]
            assert by_text[name].increase == pytest.approx(losses[0] - losses[1], abs=1e-5)
            assert by_text[name].half_width is not None
    assert measure_contributions(root / "base", "base", sets(root), SETTINGS, tmp_path) == {}


def plain_loss(folder: Path, texts: tuple[str, ...], skipped: int | None) -> float:
    """Nats per token by transformers, one block's output replaced by its input."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if skipped is not None:
        model.model.layers[skipped].register_forward_hook(
            lambda _, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        )
    total, targets = 0.0, 0
    for text in texts:
        ids = torch.tensor([token_ids(text)])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        targets += ids.shape[1] - 1
    return total / targets
