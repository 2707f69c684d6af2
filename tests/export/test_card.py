"""The model card: valid metadata, the run's recipe and results, nothing local."""

from pathlib import Path

import orjson
import pytest
from huggingface_hub import ModelCard

from llamapro.evaluation.results import ModelResult, Results, SetResult, write_results
from llamapro.export.export import export
from tests.support.exports import STEP, TinyRun, make_run, step_line, validation, write_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return make_run(tmp_path)


def test_card_states_base_recipe_data_and_results(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    card.data.to_dict()
    assert card.data.base_model == "tests/tiny-llama"
    assert card.data.pipeline_tag == "text-generation"
    for stated in (
        "expanded from 4 to 6 blocks, trained on law, wiki",
        f"| optimizer steps | {STEP} |",
        "| trained blocks | 2, 5 |",
        f"| tokens trained on | {512 * STEP:,} |",
        "| law | 80% of the tokens | not recorded |",
        "| law | 1.2500 | 1.0000 | -20.0% |",
        "39 of 39 base tensors are bit-identical",
        "`LICENSE`",
    ):
        assert stated in card.text, stated
    assert str(tmp_path) not in card.content


def test_card_of_an_earlier_checkpoint_does_not_claim_what_came_later(tiny: TinyRun, tmp_path: Path) -> None:
    lines = [step_line(step) for step in range(STEP + 1, 31)] + [validation(30, 0.5, 1.6)]
    with (tiny.folder / "metrics.jsonl").open("ab") as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in lines)
    write_checkpoint(tiny.folder, tiny.masters, tiny.record, step=30)
    export(tiny.checkpoint, tmp_path / "early")
    export(tiny.folder, tmp_path / "late")
    assert "| law | 1.2500 | 1.0000 | -20.0% |" in (tmp_path / "early/README.md").read_text()
    assert "| law | 1.2500 | 0.5000 | -60.0% |" in (tmp_path / "late/README.md").read_text()


def test_card_shows_an_evaluation_that_the_run_holds(tiny: TinyRun, tmp_path: Path) -> None:
    scored = SetResult(
        dataset="data/law",
        dataset_fingerprint="f",
        split="heldout",
        loss=2.5,
        loss_half_width=0.1,
        bits_per_byte=0.875,
        bits_per_byte_half_width=0.0125,
        tokens=12345,
        bytes=50000.0,
        rows=8,
    )
    model = ModelResult(name=str(tmp_path / "somewhere/law-model"), digest="d", sets={"law": scored})
    (tiny.folder / "evaluation").mkdir()
    write_results(tiny.folder / "evaluation", Results(settings={}, versions={}, model=model))
    export(tiny.folder, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| law | 0.8750 ± 0.0125 | 12,345 |" in card
    assert "`llamapro evaluate` of law-model" in card
    assert str(tmp_path) not in card


def test_base_that_is_no_hub_id_is_not_claimed_as_one(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, base_id="my-llama")
    export(tiny.folder, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model is None
