"""Exports at a strength below 1: their bytes, and what record, card, verify and deltas say about them."""

from pathlib import Path

import pytest
import torch

from llamapro.errors import UserError
from llamapro.expansion.record import ExpansionRecord, read_record
from llamapro.expansion.strength import described
from llamapro.expansion.verify import verify
from llamapro.export.export import export
from llamapro.export.strength import StrengthRequest, parse_strength
from tests.support.expansion import flip_bit
from tests.support.exports import STEP, TinyRun, files_of, make_run, tensors_of, write_checkpoint

HALF = StrengthRequest(0.5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tiny"))


def record_of(folder: Path) -> ExpansionRecord:
    record = read_record(folder)
    assert record is not None
    return record


def test_declared_tensors_are_scaled_and_all_others_are_those_at_strength_1(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "whole")
    summary = export(tiny.folder, tmp_path / "part", strength=StrengthRequest(0.5, {5: 0.25}))
    assert summary.strengths == {2: 0.5, 5: 0.25}
    whole, part = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "part")
    for name, tensor in part.items():
        share = {2: 0.5, 5: 0.25}[int(name.split(".")[2])] if name in tiny.record.zeroed else 1.0
        assert torch.equal(tensor, whole[name] * share), name  # halves and quarters are exact in bf16
    export(tiny.folder, tmp_path / "none", strength=StrengthRequest(0.0))
    zeroed = [tensors_of(tmp_path / "none")[name] for name in tiny.record.zeroed]
    assert zeroed and not any(tensor.view(torch.uint8).any() for tensor in zeroed)


def test_strength_1_is_the_export_as_ever(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "whole")
    export(tiny.folder, tmp_path / "one", strength=StrengthRequest(1.0, {2: 1.0}))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "one")
    assert record_of(tmp_path / "one").trained.strengths == {}


def test_record_and_card_say_the_strength_and_verify_holds_the_export_to_it(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "part", strength=StrengthRequest(0.75, reason="because of a test"))
    assert record_of(tmp_path / "part").trained.strengths == {"2": 0.75, "5": 0.75}
    assert record_of(tmp_path / "part").digest() == tiny.record.digest()
    report = verify(tmp_path / "part", tiny.base)
    assert not report.problems
    assert any("strength 0.75 (blocks 2, 5)" in rule.rule for rule in report.rules)
    card = (tmp_path / "part/README.md").read_text()
    assert "Here it is 0.75 (blocks 2, 5): because of a test." in card
    assert "Measured at strength 1, not at that of this model" in card
    name = next(iter(tiny.record.zeroed))
    flip_bit(tmp_path / "part", name)
    assert verify(tmp_path / "part", None).problems == (f"{name} differs from what was exported (SHA-256)",)


def test_delta_at_a_strength_rebuilds_the_same_export(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "part", strength=HALF)
    export(tiny.folder, tmp_path / "delta", strength=HALF, delta=True)
    export(tmp_path / "delta", tmp_path / "rebuilt", base=str(tiny.base))
    assert files_of(tmp_path / "rebuilt") == files_of(tmp_path / "part")
    with pytest.raises(UserError, match="the strength that it was exported with"):
        export(tmp_path / "delta", tmp_path / "other", base=str(tiny.base), strength=HALF)


def test_what_is_trained_on_from_a_share_is_whole_again(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "part", strength=StrengthRequest(1.0, {2: 0.5, 5: 0.25}))
    prefix = "model.layers.2."
    masters = {name: master for name, master in tiny.masters.items() if name.startswith(prefix)}
    again = write_checkpoint(tmp_path / "run", masters, tiny.record, step=STEP + 1)
    export(again, tmp_path / "next", model=tmp_path / "part")
    assert record_of(tmp_path / "next").trained.strengths == {"5": 0.25}
    export(again, tmp_path / "less", model=tmp_path / "part", strength=HALF)
    assert record_of(tmp_path / "less").trained.strengths == {"2": 0.5, "5": 0.125}
    assert not verify(tmp_path / "less", tiny.base).problems


def test_models_without_a_way_back_and_blocks_that_are_not_new_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    everything = make_run(tmp_path / "everything", everything=True)
    with pytest.raises(UserError, match="the base itself were trained"):
        export(everything.folder, tmp_path / "out", strength=HALF)
    with pytest.raises(UserError, match=r"block 3 is no trained new block \(2, 5\)"):
        export(tiny.folder, tmp_path / "out", strength=StrengthRequest(1.0, {3: 0.5}))
    plain = write_checkpoint(tmp_path / "plain", {"model.norm.weight": torch.ones(32)}, None)
    with pytest.raises(UserError, match="never expanded"):
        export(plain, tmp_path / "out", model=tiny.base, strength=HALF)
    assert not (tmp_path / "out").exists()


def test_fresh_blocks_stay_fresh_at_any_strength(tiny: TinyRun, tmp_path: Path) -> None:
    masters = {name: master for name, master in tiny.masters.items() if name.startswith("model.layers.2.")}
    checkpoint = write_checkpoint(tmp_path / "run", masters, tiny.record)
    assert export(checkpoint, tmp_path / "out", model=tiny.model, strength=HALF).strengths == {2: 0.5}
    assert record_of(tmp_path / "out").untrained_blocks() == (5,)
    assert not verify(tmp_path / "out", tiny.base).problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.75", StrengthRequest(0.75)),
        ("0", StrengthRequest(0.0)),
        ("4=0.5,9=0", StrengthRequest(1.0, {4: 0.5, 9: 0.0})),
        ("0.75,4=0", StrengthRequest(0.75, {4: 0.0})),
    ],
)
def test_strengths_are_read_as_written(text: str, expected: StrengthRequest) -> None:
    assert parse_strength(text) == expected


@pytest.mark.parametrize("text", ["", "1.5", "-0.1", "nan", "x", "4=", "a=0.5", "4=2", "4=0.5,0.7"])
def test_what_is_no_strength_is_named(text: str) -> None:
    with pytest.raises(UserError, match="strength"):
        parse_strength(text)


def test_strengths_in_words() -> None:
    assert described({9: 0.5, 4: 0.5, 14: 0.0}) == "0 (blocks 14), 0.5 (blocks 4, 9)"
    assert described({}) == ""
