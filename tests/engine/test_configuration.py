"""The DeepSpeed configuration: complete files, filled from the run, and overlays that are checked before use."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig  # type: ignore[import-untyped]

from llamapro.config.root import RunConfig
from llamapro.engine.configuration import deepspeed_configuration, strategy
from llamapro.errors import ConfigError

# Defaults that DeepSpeed changed in 2025 and 2026, or that depend on other settings: each must be written down.
UNSTABLE_DEFAULTS = [
    ("gradient_clipping",),
    ("bf16", "check_grad_overflow"),
    ("bf16", "immediate_grad_update"),
    ("data_types", "grad_accum_dtype"),
    ("communication_data_type",),
    ("zero_optimization", "overlap_comm"),
    ("zero_optimization", "offload_optimizer"),
    ("steps_per_print",),
    ("timers", "throughput", "enabled"),
]


def run_config(overlay: Path | None = None, **sections: Any) -> RunConfig:
    engine = {**sections.pop("engine", {}), "deepspeed": str(overlay) if overlay else None}
    source = {"law": {"path": "data/law", "weight": 1.0}}
    return RunConfig.model_validate(
        {"model": {"path": "work/model"}, "data": {"sources": source}, "engine": engine, **sections}
    )


def configured(config: RunConfig, stage: int = 3) -> dict[str, Any]:
    return deepspeed_configuration(config, zero_stage=stage, world_size=4, micro_sequences=3, accumulation_steps=5)


def overlay_file(folder: Path, content: Any) -> Path:
    path = folder / "overlay.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def problems_of(folder: Path, content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        configured(run_config(overlay_file(folder, content)))
    assert "overlay.json" in str(caught.value)
    return "\n".join(caught.value.problems)


def at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    for part in path:
        assert part in values, path
        values = values[part]
    return values


@pytest.mark.parametrize("stage", [1, 2, 3])
class TestFiles:
    def test_unstable_defaults_are_written_down(self, stage: int) -> None:
        for path in UNSTABLE_DEFAULTS:
            at(strategy(stage), path)
        assert strategy(stage)["zero_optimization"]["stage"] == stage

    def test_gradients_are_accumulated_and_sent_in_float32(self, stage: int) -> None:
        values = strategy(stage)
        assert values["communication_data_type"] == values["data_types"]["grad_accum_dtype"] == "fp32"

    def test_deepspeed_accepts_what_it_is_given(self, stage: int) -> None:
        found = DeepSpeedConfig(
            deepspeed_configuration(
                run_config(), zero_stage=stage, world_size=1, micro_sequences=3, accumulation_steps=5
            )
        )
        assert found.zero_config.stage == stage
        assert (found.train_batch_size, found.gradient_accumulation_steps) == (15, 5)

    def test_every_value_left_open_is_filled(self, stage: int) -> None:
        filled = configured(run_config(), stage)
        assert filled["train_batch_size"] == 60
        assert '"auto"' not in json.dumps({**filled, "data_types": None})


class TestFilling:
    @pytest.mark.parametrize(("precision", "bf16"), [("bf16", True), ("float32", False), ("fp8-frozen", True)])
    def test_precision(self, precision: str, bf16: bool) -> None:
        assert configured(run_config(engine={"precision": precision}))["bf16"]["enabled"] is bf16

    @pytest.mark.parametrize(("offload", "device"), [("none", "none"), ("optimizer", "cpu")])
    def test_offload(self, offload: str, device: str) -> None:
        values = configured(run_config(engine={"offload": offload}))
        assert values["zero_optimization"]["offload_optimizer"]["device"] == device


class TestOverlay:
    def test_values_are_laid_over_section_by_section(self, tmp_path: Path) -> None:
        overlay = {
            "communication_data_type": "bf16",
            "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"ratio": 0.5}},
            "comms_logger": {"enabled": True, "verbose": True},
        }
        values, plain = configured(run_config(overlay_file(tmp_path, overlay))), configured(run_config())
        assert values["communication_data_type"] == "bf16" and values["comms_logger"]["verbose"]
        assert values["zero_optimization"]["overlap_comm"] is False
        assert values["zero_optimization"]["offload_optimizer"] == {
            **plain["zero_optimization"]["offload_optimizer"],
            "ratio": 0.5,
        }
        assert values["zero_optimization"]["leaf_module"] == plain["zero_optimization"]["leaf_module"]
        assert values["bf16"] == plain["bf16"]

    @pytest.mark.parametrize(
        ("overlay", "words"),
        [
            ({"comunication_data_type": "fp32"}, ["comunication_data_type", "did you mean communication_data_type"]),
            ({"zero_optimization": {"overlap_com": True}}, ["overlap_com", "did you mean overlap_comm"]),
            ({"zero_optimization": {"stage3_max_live_parameter": 1}}, ["did you mean stage3_max_live_parameters"]),
            ({"zero_optimization": {"leaf_module": {"clases": []}}}, ["did you mean classes"]),
            ({"timers": {"throughput": {"enable": True}}}, ["timers.throughput.enable", "did you mean enabled"]),
            ({"train_batch_size": 4}, ["batch.global_sequences"]),
            ({"gradient_clipping": 2.0}, ["optimizer.gradient_clip_norm"]),
            ({"optimizer": {"type": "AdamW"}}, ["the section optimizer"]),
            ({"zero_optimization": {"stage": 1}}, ["engine.zero_stage"]),
            ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["engine.offload"]),
            ({"fp16": {"enabled": True}}, ["engine.precision"]),
            ({"bf16": {"check_grad_overflow": False}}, ["can't be changed"]),
            ({"zero_optimization": {"stage3_use_all_reduce_for_fetch_params": True}}, ["padded"]),
            ({"zero_optimization": {"reduce_bucket_size": "many"}}, ["reduce_bucket_size", "'many'"]),
            ("[1]", ["one JSON object"]),
            ("{", ["not valid JSON"]),
            ('{"bf16": {}, "bf16": {}}', ["bf16", "twice"]),
        ],
    )
    def test_what_is_wrong_is_refused_with_the_way_out(self, tmp_path: Path, overlay: Any, words: list[str]) -> None:
        text = problems_of(tmp_path, overlay)
        assert all(word in text for word in words), text

    def test_all_problems_are_reported_at_once(self, tmp_path: Path) -> None:
        text = problems_of(tmp_path, {"optimiser": 1, "zero_optimization": {"stage": 2, "overlap": 1}})
        assert len(text.splitlines()) == 3

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="absent.json"):
            configured(run_config(tmp_path / "absent.json"))
