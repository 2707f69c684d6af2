"""Experiments' configurations: the recipes are valid, and whatever is wrong is said at once, with the way out."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.config.base import Section
from llamapro.errors import ConfigError
from llamapro.experiments.config import AblationConfig
from llamapro.experiments.load import load_experiment
from llamapro.experiments.trace_config import TraceConfig
from tests.support.source import ROOT

RECIPES = ROOT / "launch" / "recipes"
ABLATIONS = (
    *("ablation-blocks", "ablation-placement", "compare-smollm2", "frontier-smollm2", "knowledge-encoding"),
    *("replay-smollm2", "sweep-learning-rate"),
)


def ablation_values(**changes: Any) -> dict[str, Any]:
    """A valid ablation with one variant of each kind."""
    values: dict[str, Any] = {
        "folder": "out",
        "base": "base",
        "budget_tokens": 1024,
        "data": {"sequence_length": 64, "sources": {"law": {"path": "law", "weight": 1.0}}},
        "batch": {"global_sequences": 4},
        "evaluation": {"domain": {"law": "law"}, "general": {"wiki": "wiki"}},
        "variants": {"blocks": {"expand": {"new_blocks": 2}}, "full": {"full": {}}},
    }
    return values | changes


def problems(folder: Path, values: dict[str, Any], root: type[Section] = AblationConfig) -> str:
    file = folder / "experiment.yaml"
    file.write_bytes(orjson.dumps(values))
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, root)
    return str(caught.value)


@pytest.mark.parametrize("name", ABLATIONS)
def test_recipe_is_valid_and_says_its_own_command(name: str) -> None:
    file = RECIPES / f"{name}.yaml"
    config = load_experiment(file, AblationConfig)
    assert config.folder.name == name
    assert f"llamapro experiment ablation --config launch/recipes/{name}.yaml" in file.read_text()


def test_sequence_recipe_is_valid() -> None:
    config = load_experiment(RECIPES / "trace-smollm2.yaml", TraceConfig)
    assert list(config.tasks) == ["phenotypes", "instructions", "wikipedia"]
    assert {kind for method in config.methods.values() for kind in method.kinds} == {"expand", "lora", "full"}


def test_recipes_are_the_papers_studies() -> None:
    blocks = load_experiment(RECIPES / "ablation-blocks.yaml", AblationConfig).variants.values()
    assert [variant.expand.new_blocks for variant in blocks if variant.expand] == [1, 2, 4, 8, 16, 32]
    placed = load_experiment(RECIPES / "ablation-placement.yaml", AblationConfig).variants
    expansions = [variant.expand for variant in placed.values() if variant.expand]
    assert [expand.placement for expand in expansions] == ["interleaved", "prefix", "suffix", "importance"]
    assert placed["lora-1024"].lora is not None and placed["lora-1024"].lora.rank == 1024
    sweep = load_experiment(RECIPES / "sweep-learning-rate.yaml", AblationConfig)
    assert sweep.budget_tokens == 200 * sweep.step_tokens and len(sweep.variants) == 3


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    wrong = ablation_values(
        budget_tokens=1000, seeds=[1, 1], launch={"processes": 2}, schedule={"steps": 5}, varients=1
    )
    said = problems(tmp_path, wrong)
    assert "5 problems" in said
    for part in (
        "give 1024",
        "names 1 more than once",
        "launcher: deepspeed",
        "schedule.steps",
        "did you mean variants",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"both": {"full": {}, "expand": {"new_blocks": 2}}}}, "variants.both: has expand and full"),
        ({"variants": {"none": {}}}, "variants.none: has none"),
        ({"variants": {"base": {"base": {}}}}, "variants.base.base: nothing happens"),
        (
            {"variants": {"a": {"expand": {"new_blocks": 3, "copies_per_group": 2}}}},
            "no multiple of copies_per_group",
        ),
        ({"variants": {"a": {"expand": {"new_blocks": 3, "placement": "sufix"}}}}, "choose interleaved"),
        ({"variants": {"a": {"expand": {"new_blocks": 3, "placement": "importance"}}}}, "give probe"),
        ({"variants": {"a": {"expand": {"new_blocks": 3, "probe": "wiki"}}}}, "give probe"),
        ({"variants": {"a": {"lora": {"rank": 3}}}}, "variants.a.lora.alpha: is required"),
        ({"evaluation": {"domain": {"law": "law"}}}, "one domain text and one general text"),
        ({"evaluation": {"domain": {"law": "a"}, "general": {"law": "b"}}}, "evaluation.general.law"),
        ({"variants": {"a": {"full": {}, "objective": {"replay_kl": 1.0, "sets": ["law"]}}}}, "only expand has one"),
        (
            {"variants": {"a": {"expand": {"new_blocks": 2}, "objective": {"replay_kl": 1.0, "sets": ["lwa"]}}}},
            "did you mean law",
        ),
        (
            {"variants": {"a": {"expand": {"new_blocks": 2}, "objective": {"replay_kl": 1.0}}}},
            "variants.a.objective.replay_kl: applies to no source",
        ),
        ({"variants": {"a": {"full": {}, "strength": 0.5}}}, "variants.a.strength: is how much of the new blocks"),
        ({"variants": {"a": {"expand": {"new_blocks": 2}, "strength": 1.5}}}, "variants.a.strength"),
        (
            {
                "variants": {"a": {"expand": {"new_blocks": 2}, "strength": 0.5}},
                "sft": {"data": {"sequence_length": 64, "sources": {"chats": {"path": "chats", "weight": 1.0}}}},
            },
            "before the instruction tuning and after it",
        ),
        ({"seeds": []}, "seeds"),
        ({"variants": {}}, "variants"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in problems(tmp_path, ablation_values(**changes))


def test_a_sequence_refuses_mixed_scores_and_the_base_as_a_method(tmp_path: Path) -> None:
    values = {
        "folder": "out",
        "base": "base",
        "tokens_per_task": 8192,
        "sequence_length": 256,
        "batch": {"global_sequences": 4},
        "tasks": {"a": {"data": "a"}, "b": {"data": "b", "benchmark": "arc_easy"}},
        "methods": {
            "nothing": {"base": {}},
            "kept": {"expand": {"new_blocks": 2}, "objective": {"replay_kl": 0.5}},
            "weak": {"expand": {"new_blocks": 2}, "strength": 0.5},
        },
    }
    said = problems(tmp_path, values, TraceConfig)
    assert "tasks: some have a benchmark" in said
    assert "methods.nothing.base" in said
    assert "methods.kept.objective" in said
    assert "methods.weak.strength" in said
