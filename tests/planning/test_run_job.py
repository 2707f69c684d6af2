"""A run configuration becomes the job that it describes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.config.root import RunConfig
from llamapro.errors import ConfigError
from llamapro.planning.plan import Job
from llamapro.planning.run_job import compiles, job_of_run
from llamapro.planning.shape import DecoderShape, Learning
from tests.support.config import config_of

SHAPE = DecoderShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
)


def configured(folder: Path, **engine: Any) -> RunConfig:
    return config_of(folder, batch={"global_sequences": 10}, data={"sequence_length": 64}, engine=engine)


def job(folder: Path, **engine: Any) -> Job:
    return job_of_run(configured(folder, **engine), SHAPE, Learning(frozenset({2, 5})), 4, "cpu")


def test_settings_become_the_jobs(tmp_path: Path) -> None:
    found = job(tmp_path, precision="float32", activation_memory_gib=2.5)
    assert (found.precision, found.activation_memory_gib, found.sequence_length) == ("float32", 2.5, 64)
    assert (found.world_size, found.share, found.device, found.compiled) == (4, 3, "cpu", False)


def test_deepspeeds_buffers_are_those_of_the_runs_own_file(tmp_path: Path) -> None:
    overlay = tmp_path / "own.json"
    overlay.write_bytes(orjson.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    assert job(tmp_path, deepspeed=str(overlay)).memory(2, 1).communication < job(tmp_path).memory(2, 1).communication
    overlay.write_text("no JSON")
    with pytest.raises(ConfigError, match="engine.deepspeed: not valid JSON"):
        job(tmp_path, deepspeed=str(overlay))


def test_auto_compiles_on_gpus_what_makes_one_graph() -> None:
    experts = replace(SHAPE, block_sizes=tuple(replace(size, experts=True) for size in SHAPE.block_sizes))
    scoring = replace(SHAPE, scores_kept=True)
    assert [compiles("auto", shape, "cuda") for shape in (SHAPE, experts, scoring)] == [True, False, False]
    assert [compiles(setting, SHAPE, "cpu") for setting in ("auto", "on", "off")] == [False, True, False]
    assert not compiles("off", SHAPE, "cuda")
