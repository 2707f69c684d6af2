"""Settings that this version can't honour are refused by name, and only those values of them."""

from pathlib import Path
from typing import Any

import pytest

from llamapro.config.availability import UNAVAILABLE, setting, unavailable_settings
from tests.support.config import config_of

REFUSED: dict[str, list[Any]] = {
    "engine.offload": ["optimizer"],
    "logging.trackers": [["wandb"], ["tensorboard", "mlflow"]],
}
HONOURED: dict[str, list[Any]] = {
    "model.trainable": ["new", "all", [1, 2]],
    "engine.precision": ["bf16", "float32", "fp8-frozen"],
    "engine.activation_memory_gib": ["auto", "unlimited", 10, 2.5],
    "engine.attention": ["auto", "flash", "cudnn", "sdpa", "math"],
    "engine.compile": ["auto", "on", "off"],
    "guards.spike": ["skip", "rollback", "off"],
    "objective.replay_kl": [0.0, 0.1],
    "guards.retention": [None, {"set": "law"}, {"set": "law", "action": "stop"}],
    "logging.trackers": [["tensorboard"], []],
}
# What has to stand beside a value so that no rule between fields is broken.
BESIDE: dict[str, dict[str, Any]] = {
    "objective.replay_kl": {"sets": ["wiki"]},
}


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


def test_defaults_are_available(tmp_path: Path) -> None:
    assert unavailable_settings(config_of(tmp_path)) == []


def test_every_row_is_tried_below() -> None:
    assert {row.key for row in UNAVAILABLE} == REFUSED.keys()


@pytest.mark.parametrize(("key", "value"), pairs(REFUSED))
def test_a_value_that_can_not_be_honoured_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    section, field = key.split(".")
    config = config_of(tmp_path, **{section: {field: value}})
    (problem,) = unavailable_settings(config)
    assert problem.startswith(f"{key}: ") and "is not available in this version; " in problem


@pytest.mark.parametrize(("key", "value"), pairs(HONOURED))
def test_a_value_that_is_honoured_is_accepted(tmp_path: Path, key: str, value: Any) -> None:
    section, field = key.split(".")
    config = config_of(tmp_path, **{section: {field: value, **BESIDE.get(key, {})}})
    assert unavailable_settings(config) == []


def test_a_setting_is_found_by_its_dotted_key(tmp_path: Path) -> None:
    assert setting(config_of(tmp_path, schedule={"steps": 17}), "schedule.steps") == 17
