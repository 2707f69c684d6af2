"""The DeepSpeed configuration of a run: `ds_configs/zeroN.json`, filled from the run configuration, plus an overlay.

The JSON files say everything; the engine only replaces their "auto" values. An overlay file of the user may change
the rest, except what the run configuration sets and what would make training or checkpoints wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig  # type: ignore[import-untyped]
from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # type: ignore[import-untyped]
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # type: ignore[import-untyped]
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig  # type: ignore[import-untyped]
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from llamapro.config.root import RunConfig
from llamapro.config.strategies import Json, read_overlay, strategy
from llamapro.errors import ConfigError

KeyPath = tuple[str, ...]

SECTIONS: Mapping[KeyPath, type[BaseModel]] = {
    ("zero_optimization",): DeepSpeedZeroConfig,
    ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
    ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
    ("zero_optimization", "leaf_module"): DeepSpeedZeroLeafModuleConfig,
    ("bf16",): DeepSpeedBF16Config,
    ("comms_logger",): CommsLoggerConfig,
}
"""Sections whose keys DeepSpeed declares; every other section has the keys of the JSON file."""

DIAGNOSTIC_KEYS = ("comms_logger", "log_level")
"""Top-level keys beyond those of the JSON files that an overlay may set."""

SET_ELSEWHERE: Mapping[KeyPath, str] = {
    ("train_batch_size",): "batch.global_sequences",
    ("train_micro_batch_size_per_gpu",): "batch.micro_sequences",
    ("gradient_accumulation_steps",): "batch.global_sequences and batch.micro_sequences",
    ("gradient_clipping",): "optimizer.gradient_clip_norm",
    ("optimizer",): "the section optimizer",
    ("scheduler",): "the section schedule",
    ("bf16", "enabled"): "engine.precision",
    ("fp16",): "engine.precision",
    ("zero_optimization", "stage"): "engine.zero_stage",
    ("zero_optimization", "offload_optimizer", "device"): "engine.offload",
}
"""Keys that the run configuration decides."""

FIXED: Mapping[KeyPath, str] = {
    ("managed_gradient_accumulation",): "the engine says itself where accumulation ends",
    ("gradient_allreduce_op",): "the loss is scaled for averaged gradients",
    ("bf16", "check_grad_overflow"): "without it a non-finite gradient would be applied",
    ("bf16", "bf16_master_weights_and_grads"): "checkpoints hold float32 weights",
    ("bf16", "bf16_optimizer_states"): "checkpoints hold float32 optimizer state",
    ("data_types", "grad_accum_dtype"): "gradients are accumulated in float32",
    ("zero_optimization", "compute_grad_norm"): "the gradient norm decides about clipping and skipping",
    ("zero_optimization", "stage3_use_all_reduce_for_fetch_params"): "it corrupts padded parameters",
}
"""Keys whose change would make training or checkpoints wrong, with the reason."""


def deepspeed_configuration(
    config: RunConfig, *, zero_stage: int, world_size: int, micro_sequences: int, accumulation_steps: int
) -> Json:
    """The complete configuration that DeepSpeed is given.

    Raises:
        ConfigError: every problem of the overlay file `engine.deepspeed`.
    """
    filled = _fill(strategy(zero_stage), config)
    filled["train_batch_size"] = world_size * micro_sequences * accumulation_steps
    filled["train_micro_batch_size_per_gpu"] = micro_sequences
    filled["gradient_accumulation_steps"] = accumulation_steps
    left = [".".join(path) for path, value in _leaves(filled) if value == "auto" and path[0] != "data_types"]
    assert not left, f"nothing fills {left}"
    if config.engine.deepspeed is None:
        return filled
    return overlaid(filled, read_overlay(config.engine.deepspeed), str(config.engine.deepspeed))


def overlaid(base: Json, overlay: Json, source: str) -> Json:
    """`base` with the values of `overlay`, section by section.

    Raises:
        ConfigError: unknown keys (with the nearest name), keys that the run configuration sets, wrong values.
    """
    problems = [problem for path, _ in _leaves(overlay) if (problem := _refusal(path, base))]
    merged = _merged(base, overlay)
    if not problems:
        problems = list(_wrong_values(merged))
    if problems:
        raise ConfigError(problems, source)
    return merged


def _fill(values: Json, config: RunConfig) -> Json:
    """Replace the "auto" values that depend on the run configuration only."""
    values["bf16"]["enabled"] = config.engine.precision != "float32"
    device = "cpu" if config.engine.offload == "optimizer" else "none"
    values["zero_optimization"]["offload_optimizer"] = {"device": device, "pin_memory": True}
    return values


def _refusal(path: KeyPath, base: Json) -> str:
    """Why an overlay may not set this key; empty when it may."""
    key = ".".join(path)
    for length in range(1, len(path) + 1):
        part = path[:length]
        if part in SET_ELSEWHERE:
            return f"{key}: set {SET_ELSEWHERE[part]} in the run configuration instead"
        if part in FIXED:
            return f"{key}: can't be changed, because {FIXED[part]}"
        names = _names(part[:-1], base)
        if names and part[-1] not in names:
            nearest = get_close_matches(part[-1], names, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; keys there: {', '.join(names)}"
            return f"{key}: unknown key{hint}"
    return ""


def _names(path: KeyPath, base: Json) -> Sequence[str]:
    """Keys that exist in a section; none where the path leads to a value."""
    if model := SECTIONS.get(path):
        return [field.alias or name for name, field in model.model_fields.items()]
    section: Any = base
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        return []
    return [*section, *(DIAGNOSTIC_KEYS if not path else ())]


def _wrong_values(values: Json) -> Iterator[str]:
    for path, model in SECTIONS.items():
        section = _at(values, path)
        if len(path) == 1 and isinstance(section, dict):
            try:
                model.model_validate(section)
            except ValidationError as error:
                for item in error.errors(include_url=False):
                    key = ".".join([*path, *map(str, item["loc"])])
                    yield f"{key}: {item['input']!r} is not valid: {item['msg']}"


def _at(values: Json, path: KeyPath) -> Any:
    found: Any = values
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _leaves(values: Json, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _merged(base: Json, overlay: Json) -> Json:
    both = {
        name: value for name, value in base.items() if isinstance(value, dict) and isinstance(overlay.get(name), dict)
    }
    return {**base, **overlay, **{name: _merged(value, overlay[name]) for name, value in both.items()}}
