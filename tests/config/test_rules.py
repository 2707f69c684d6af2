"""Each rule between fields fires on what it forbids, and only on that."""

from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import ConfigError
from tests.support.config import config_of

REPEATED = {"law": {"path": "a", "repeat": 1.5}, "wiki": {"path": "b", "repeat": 1}}
MIXED = {"law": {"path": "a", "weight": 1}, "wiki": {"path": "b", "repeat": 1}}

BROKEN: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (
        "data.sources",
        {"data": {"sources": {"a": {"path": "a", "weight": 1}, "b": {"path": "b", "repeat": 1}}}},
        ("mixed",),
    ),
    ("data.sources.a", {"data": {"sources": {"a": {"path": "a", "weight": 1, "repeat": 2}}}}, ("both",)),
    ("data.sources.a", {"data": {"sources": {"a": {"path": "a"}}}}, ("neither",)),
    ("data.stages.0.weights", {"data": {"stages": [{"from_step": 5, "weights": {"lwa": 1}}]}}, ("lwa", "mean law?")),
    (
        "data.stages.1.from_step",
        {"data": {"stages": [{"from_step": 5, "weights": {"law": 1}}, {"from_step": 5, "weights": {"wiki": 1}}]}},
        ("in order",),
    ),
    (
        "data.stages.0.from_step",
        {"data": {"stages": [{"from_step": 9, "weights": {"law": 1}}]}, "schedule": {"steps": 9}},
        ("never reached",),
    ),
    ("data.stages", {"data": {"sources": REPEATED, "stages": [{"from_step": 5, "weights": {"law": 1}}]}}, ("repeat",)),
    ("schedule.steps", {"schedule": {"steps": "auto"}}, ("repeat", "law")),
    (
        "schedule.decay_fraction",
        {"schedule": {"decay": "wsd", "decay_fraction": 0.7, "warmup_fraction": 0.4}},
        ("0.7", "0.4"),
    ),
    ("guards.retention.set", {"guards": {"retention": {"set": "genral"}}}, ("genral", "law, wiki")),
    (
        "guards.retention.set",
        {"validation": {"sets": {"general": "g"}}, "guards": {"retention": {"set": "wiki"}}},
        ("wiki", "general"),
    ),
    ("objective.sets", {"objective": {"replay_kl": 0.1, "sets": ["wikki"]}}, ("wikki", "mean wiki?")),
    ("objective.replay_kl", {"objective": {"replay_kl": 0.1}}, ("objective.sets",)),
    ("model.trainable", {"model": {"trainable": "lora"}}, ("model.lora",)),
    ("model.lora", {"model": {"lora": {"rank": 8, "alpha": 16}}}, ("model.trainable",)),
    ("model.trainable", {"model": {"trainable": [4, 9, 4]}}, ("4", "more than once")),
    ("engine.precision", {"engine": {"precision": "fp8-frozen", "zero_stage": 3}}, ("zero_stage 3", "bf16")),
    (
        "engine.precision",
        {
            "engine": {"precision": "fp8-frozen"},
            "model": {"trainable": "lora", "lora": {"rank": 8, "alpha": 16}},
        },
        ("adapters", "bf16"),
    ),
]

ALLOWED: list[dict[str, Any]] = [
    {"data": {"sources": REPEATED}, "schedule": {"steps": "auto"}},
    {"data": {"stages": [{"from_step": 5, "weights": {"law": 1}}, {"from_step": 6, "weights": {"wiki": 1}}]}},
    {"schedule": {"decay": "cosine", "decay_fraction": 0.99}},
    {"schedule": {"decay": "wsd", "decay_fraction": 0.5, "warmup_fraction": 0.5}},
    {"guards": {"retention": {"set": "wiki"}}},
    {"validation": {"sets": {"general": "g"}}, "guards": {"retention": {"set": "general"}}},
    {"objective": {"replay_kl": 0.1, "sets": ["wiki"]}},
    {"model": {"trainable": "lora", "lora": {"rank": 8, "alpha": 16}}},
    {"engine": {"precision": "fp8-frozen"}},
    {"engine": {"precision": "fp8-frozen", "zero_stage": 2}},
]


@pytest.mark.parametrize(("key", "sections", "parts"), BROKEN)
def test_a_broken_rule_is_told_by_its_key(
    tmp_path: Path, key: str, sections: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **sections)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}: ") and all(part in problem for part in parts), problem


@pytest.mark.parametrize("sections", ALLOWED)
def test_what_keeps_the_rules_is_accepted(tmp_path: Path, sections: dict[str, Any]) -> None:
    config_of(tmp_path, **sections)
