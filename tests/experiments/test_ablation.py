"""An ablation's course: what runs, what is skipped, what is left, who is named, and whether the numbers are right."""

import statistics
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.errors import CheckFailed, RetryLater
from tests.support.experiments import Commands, ablation_values, write_values
from tests.support.texts import WIKI, write_text_dataset

ONE_CHAIN = ["export", "evaluate"]


def experiment(folder: Path, values: dict[str, Any]) -> int:
    return main(["experiment", "ablation", "--config", str(write_values(folder, values))])


def results(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = orjson.loads((folder / "out" / "ablation.json").read_bytes())
    return loaded


def test_every_variant_is_trained_and_measured_once_and_nothing_large_is_left(
    inputs: Path, tmp_path: Path, commands: Commands
) -> None:
    values = ablation_values(inputs, tmp_path / "out")
    assert experiment(tmp_path, values) == 0
    assert commands.said == [
        *("expand", "pretrain blocks 1", *ONE_CHAIN, "pretrain full 1", *ONE_CHAIN),
        *("pretrain blocks 2", *ONE_CHAIN, "pretrain full 2", *ONE_CHAIN),
    ]
    assert list((tmp_path / "out").rglob("*.safetensors")) == []
    first = results(tmp_path)
    assert experiment(tmp_path, values) == 0
    assert len(commands.said) == 13, "nothing ran again"
    assert results(tmp_path) == first


def test_all_variants_of_a_seed_see_the_same_data_and_only_what_is_compared_differs(
    inputs: Path, tmp_path: Path, commands: Commands
) -> None:
    assert experiment(tmp_path, ablation_values(inputs, tmp_path / "out", seeds=[7])) == 0
    blocks, full = commands.configurations
    for name in ("data", "batch", "optimizer", "engine", "objective"):
        assert getattr(blocks, name) == getattr(full, name)
    assert blocks.run.seed == full.run.seed == 7
    assert blocks.schedule.steps == full.schedule.steps == 1024 // (4 * 64)
    assert (blocks.schedule.learning_rate, full.schedule.learning_rate) == (0.02, 0.01)
    assert (blocks.model.trainable, full.model.trainable) == ("new", "all")
    assert full.model.path == inputs / "base"


def test_a_variant_may_have_an_objective_of_its_own(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    expand = {"expand": {"new_blocks": 2}}
    pulled = {**expand, "objective": {"replay_kl": 0.5, "sets": ["law"]}}
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], variants={"plain": expand, "pulled": pulled})
    assert experiment(tmp_path, values) == 0
    plain, own = (found.objective for found in commands.configurations)
    assert (plain.replay_kl, plain.sets) == (0.0, ())
    assert (own.replay_kl, own.sets) == (0.5, ("law",))


def test_strength_leads_from_the_base_to_what_was_trained(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    """The noise of the pretended training is the same for all, so only the strength differs."""
    expand = {"expand": {"new_blocks": 2}}
    kept = {f"kept-{percent}": {**expand, "strength": percent / 100} for percent in (0, 50, 100)}
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], keep=True, variants={"trained": expand, **kept})
    assert experiment(tmp_path, values) == 0
    changes = {name: row["domain"]["mean"] for name, row in results(tmp_path)["rows"].items()}
    assert changes["kept-0"] == 0
    assert changes["kept-100"] == changes["trained"] != 0
    assert changes["kept-50"] not in (0, changes["trained"])
    assert experiment(tmp_path, values | {"variants": {"trained": {**expand, "strength": 0}}}) == 0
    assert commands.said[-2:] == ["export", "evaluate"], "another strength needs no other training"
    assert results(tmp_path)["rows"]["trained"]["domain"]["mean"] == 0


def test_numbers_are_those_of_the_measurements(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    assert experiment(tmp_path, ablation_values(inputs, tmp_path / "out")) == 0
    found = results(tmp_path)
    for variant in ("blocks", "full"):
        changes: dict[str, list[float]] = {"law": [], "wiki": []}
        for seed in (1, 2):
            file = tmp_path / "out" / "runs" / variant / f"seed-{seed}" / "pretrain.measured.json"
            measured = orjson.loads(file.read_bytes())["texts"]
            for name, values in changes.items():
                values.append(measured["model"]["sets"][name]["loss"] / measured["base"]["sets"][name]["loss"] - 1)
        row = found["rows"][variant]
        for key, name in (("domain", "law"), ("general", "wiki")):
            assert row[key]["mean"] == pytest.approx(statistics.mean(changes[name]))
            assert row[key]["deviation"] == pytest.approx(statistics.stdev(changes[name]))
        assert row["tokens"]["mean"] == 512.0 * 4
        assert row["seconds"]["mean"] == 2.0 * 4
    parameters = {name: row["parameters"] for name, row in found["rows"].items()}
    block = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 88 + 2 * 32  # q, o; k, v; gate, up, down; norms
    assert parameters == {"blocks": 2 * block, "full": 4 * block + 2 * 320 * 32 + 32}


def test_the_page_has_every_variant_and_the_picture(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    assert experiment(tmp_path, ablation_values(inputs, tmp_path / "out")) == 0
    page = (tmp_path / "out" / "ablation.md").read_text()
    row = results(tmp_path)["rows"]["blocks"]["domain"]
    assert f"| blocks | {100 * row['mean']:+.2f} ± {100 * row['deviation']:.2f} |" in page
    picture = (tmp_path / "out" / "ablation.svg").read_text()
    assert picture.startswith("<svg") and ">blocks<" in picture and ">full<" in picture


def test_a_failed_variant_is_named_and_the_others_go_on(
    inputs: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.faults["blocks/seed-1"] = CheckFailed("the loss is not finite")
    values = ablation_values(inputs, tmp_path / "out")
    assert experiment(tmp_path, values) == 1
    said = capsys.readouterr().err
    assert "blocks, seed 1: the loss is not finite" in said
    found = results(tmp_path)
    assert list(found["failed"]) == ["blocks, seed 1"]
    assert (found["rows"]["blocks"]["seeds"], found["rows"]["full"]["seeds"]) == ([2], [1, 2])
    assert found["rows"]["blocks"]["domain"]["deviation"] is None
    commands.faults.clear()
    commands.said.clear()
    assert experiment(tmp_path, values) == 0
    assert commands.said == ["expand", "pretrain blocks 1", *ONE_CHAIN], "only what was missing"
    assert results(tmp_path)["failed"] == {}


def test_when_everything_fails_the_command_fails(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    commands.faults["seed-"] = CheckFailed("no")
    assert experiment(tmp_path, ablation_values(inputs, tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "ablation.json").exists()


def test_an_interrupted_experiment_asks_to_be_started_again_and_continues(
    inputs: Path, tmp_path: Path, commands: Commands
) -> None:
    commands.faults["full/seed-1"] = RetryLater("interrupted")
    values = ablation_values(inputs, tmp_path / "out")
    assert experiment(tmp_path, values) == 75
    assert list(results(tmp_path)["rows"]) == ["blocks"], "what is measured stands in a table already"
    commands.faults.clear()
    commands.said.clear()
    assert experiment(tmp_path, values) == 0
    assert commands.said[:1] == ["pretrain full 1"]


def test_another_seed_or_variant_adds_to_what_is_there(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    assert experiment(tmp_path, ablation_values(inputs, tmp_path / "out", seeds=[1])) == 0
    commands.said.clear()
    values = ablation_values(inputs, tmp_path / "out", seeds=[1, 3])
    values["variants"]["slow"] = {"full": {}, "learning_rate": 0.001}
    assert experiment(tmp_path, values) == 0
    trained = [said for said in commands.said if said.startswith("pretrain")]
    assert trained == ["pretrain slow 1", "pretrain blocks 3", "pretrain full 3", "pretrain slow 3"]


@pytest.mark.parametrize(
    "changes", [{"budget_tokens": 2048}, {"evaluation": {"sequences": 1}}, {"data": {"packing": "concat"}}]
)
def test_other_settings_are_not_taken_for_the_same(
    inputs: Path, tmp_path: Path, commands: Commands, changes: dict[str, Any]
) -> None:
    values = ablation_values(inputs, tmp_path / "out", seeds=[1])
    assert experiment(tmp_path, values) == 0
    commands.said.clear()
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    assert experiment(tmp_path, values) == 0
    assert [said for said in commands.said if said.startswith("pretrain")] == ["pretrain blocks 1", "pretrain full 1"]


def test_models_are_kept_on_request_and_only_measured_again(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], keep=True)
    assert experiment(tmp_path, values) == 0
    assert (tmp_path / "out/runs/full/seed-1/pretrain.model/config.json").is_file()
    commands.said.clear()
    values["evaluation"] = {**values["evaluation"], "sequences": 1}
    assert experiment(tmp_path, values) == 0
    assert commands.said == ["evaluate", "evaluate"]


def test_variants_that_add_the_same_blocks_share_them(inputs: Path, tmp_path: Path, commands: Commands) -> None:
    rates = {f"rate-{rate}": {"expand": {"new_blocks": 2}, "learning_rate": rate} for rate in (1, 2, 3)}
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], variants=rates)
    assert experiment(tmp_path, values) == 0
    assert commands.said.count("expand") == 1


def test_the_same_instruction_tuning_follows_on_the_base_and_on_what_was_pretrained(
    inputs: Path, tmp_path: Path, commands: Commands
) -> None:
    law = {"sequence_length": 64, "sources": {"law": {"path": str(inputs / "law"), "weight": 1.0}}}
    sft = {"data": law, "batch": {"global_sequences": 4}, "schedule": {"steps": 2, "learning_rate": 0.01}}
    variants = {"base": {"base": {}}, "blocks": {"expand": {"new_blocks": 2}}}
    values = ablation_values(inputs, tmp_path / "out", seeds=[1], variants=variants, sft=sft)
    assert experiment(tmp_path, values) == 0
    assert commands.said == [
        *("sft base 1", *ONE_CHAIN),
        *("expand", "pretrain blocks 1", "export", "sft blocks 1", *ONE_CHAIN),
    ]
    on_base, pretraining, on_blocks = commands.configurations
    assert on_base.model.path == inputs / "base"
    assert on_blocks.model.path == tmp_path / "out" / "runs" / "blocks" / "seed-1" / "pretrain.model"
    assert (pretraining.model.trainable, on_blocks.model.trainable) == ("new", "all")
    assert on_base.schedule == on_blocks.schedule
    assert list((tmp_path / "out").rglob("*.safetensors")) == []
    commands.said.clear()
    assert experiment(tmp_path, values) == 0
    assert commands.said == []


def test_missing_inputs_are_said_at_once_before_anything_runs(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment(tmp_path, ablation_values(tmp_path / "nowhere", tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "4 problems" in said
    for key in ("base:", "data.sources.law:", "evaluation.domain.law:", "evaluation.general.wiki:"):
        assert key in said
    assert commands.said == []


def test_a_text_without_held_out_documents_is_refused_before_anything_is_trained(
    inputs: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text_dataset(tmp_path / "bare", inputs / "base", (), train=WIKI)
    evaluation = {"domain": {"law": str(inputs / "law")}, "general": {"bare": str(tmp_path / "bare")}}
    assert experiment(tmp_path, ablation_values(inputs, tmp_path / "out", evaluation=evaluation)) == 2
    said = capsys.readouterr().err
    assert "evaluation.general.bare" in said and "has no held-out documents" in said
    assert commands.said == []
