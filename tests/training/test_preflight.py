"""Facts about model, data and ranks are checked before anything starts, all problems at once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llamapro.config.root import RunConfig
from llamapro.data.tokenizer_identity import tokenizer_identity
from llamapro.errors import ConfigError, UserError
from llamapro.expansion.expand import expand
from llamapro.planning.memory import GIB
from llamapro.planning.tables import gib as in_gib
from llamapro.training.device import Device, cpu_device
from llamapro.training.preflight import Facts, check_facts, show_plan
from llamapro.training.tokenizer import model_tokenizer_identity
from tests.support.config import config_of
from tests.support.datasets import DOCUMENT_TOKENS, write_dataset
from tests.support.families import MIXTURES
from tests.support.models import save_tiny_llama, tiny_tokenizer

CPU = cpu_device(2)
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks grown to six, float32; new blocks are 2 and 5."""
    folder = tmp_path_factory.mktemp("models")
    record = expand(str(save_tiny_llama(folder / "base")), folder / "grown", new_blocks=2)
    assert record.new_blocks == (2, 5)
    return folder / "grown"


@pytest.fixture(scope="module")
def data(grown: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two datasets of 20 × 50 tokens, as `data.sources`."""
    folder = tmp_path_factory.mktemp("data")
    identity = model_tokenizer_identity(grown)
    paths = {name: write_dataset(folder / name, identity, seed=seed) for seed, name in enumerate(("law", "wiki"))}
    return {"law": {"path": str(paths["law"]), "weight": 0.8}, "wiki": {"path": str(paths["wiki"]), "weight": 0.2}}


@pytest.fixture
def configure(grown: Path, data: dict[str, Any], tmp_path: Path) -> Configure:
    """A configuration that passes, with sections laid over it."""

    def build(**sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"path": str(grown)},
            "data": {"sequence_length": 64, "sources": data},
            "batch": {"global_sequences": 8},
            "schedule": {"steps": 2},
            "engine": {"precision": "float32"},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return config_of(tmp_path, **values)

    return build


def facts_of(config: RunConfig, stage: Any = "pretrain", world_size: int = 2, device: Device = CPU) -> Facts:
    return check_facts(config, stage, world_size, device)


def problems_of(config: RunConfig, stage: Any = "pretrain") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        facts_of(config, stage)
    assert not dist.is_initialized()
    return caught.value.problems


def only_problem(config: RunConfig, stage: Any = "pretrain") -> str:
    (problem,) = problems_of(config, stage)
    return problem


def test_a_run_that_can_start_has_all_its_facts(configure: Configure, grown: Path) -> None:
    facts = facts_of(configure())
    assert facts.model_folder == grown and facts.record is not None and facts.record.blocks == 6
    assert facts.trainable.blocks == {2, 5} and not facts.trainable.everything
    assert list(facts.sources) == list(facts.validation_sets) == ["law", "wiki"]
    assert facts.sources["law"].split("train").tokens == 20 * DOCUMENT_TOKENS
    assert (facts.zero_stage, facts.steps, facts.sequence_length) == (1, 2, 64)
    assert facts.micro_sequences * facts.accumulation_steps == 4
    assert facts.family.decoder_prefix == "model.layers."
    assert facts.warnings == ()


def test_all_problems_are_told_at_once(configure: Configure, data: dict[str, Any], tmp_path: Path) -> None:
    foreign = write_dataset(tmp_path / "foreign", "0" * 64)
    config = configure(
        model={"trainable": [1, 5]},
        data={
            "sequence_length": 512,
            "sources": {
                "law": {"path": str(tmp_path / "absent"), "weight": 1},
                "wiki": {"path": str(foreign), "weight": 1},
            },
        },
        engine={
            "precision": "bf16",
            "offload": "optimizer",
            "attention": "cudnn",
            "deepspeed": str(tmp_path / "absent.json"),
        },
    )
    told = {problem.partition(":")[0]: problem for problem in problems_of(config)}
    expected = {
        "engine.attention": ("cudnn can't run: cuDNN is for CUDA devices, not for cpu; use auto",),
        "engine.offload": ("not available in this version",),
        "engine.deepspeed": ("does not exist",),
        "engine.precision": ("float32 weights", "expand --dtype bf16", "allow_cast"),
        "data.sequence_length": ("512", "256 positions", "rope_parameters", "factor 2"),
        "model.trainable": ("blocks 1 are not in the record", "2, 5"),
        "data.sources.law.path": ("absent",),
        "data.sources.wiki.path": ("another tokenizer",),
    }
    assert told.keys() == expected.keys()
    for key, parts in expected.items():
        assert all(part in told[key] for part in parts), told[key]


def test_compiling_without_a_compiler_is_refused_before_anything_starts(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_facts(configure(engine={"compile": "on"}), "pretrain", 1).zero_stage
    monkeypatch.setenv("CXX", "absent-compiler")
    (problem,) = problems_of(configure(engine={"compile": "on"}))
    assert problem == "engine.compile: on can't be done: there is no C++ compiler (absent-compiler); use auto"


def test_a_missing_model_does_not_hide_what_is_wrong_with_the_data(configure: Configure, tmp_path: Path) -> None:
    config = configure(
        model={"path": str(tmp_path / "nowhere")}, data={"sources": {"law": {"path": str(tmp_path), "weight": 1}}}
    )
    assert [problem.partition(":")[0] for problem in problems_of(config)] == ["model.path", "data.sources.law.path"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({}, "has no config.json"),
        ({"config.json": {"model_type": "llama"}}, "holds neither"),
        ({"config.json": {"model_type": "gpt9"}, "model.safetensors": b"\x00" * 4}, "gpt9"),
    ],
    ids=["empty", "no weights", "unknown family"],
)
def test_a_folder_that_is_no_model_is_refused(
    configure: Configure, tmp_path: Path, content: dict[str, Any], part: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, value in content.items():
        (folder / name).write_bytes(value if isinstance(value, bytes) else orjson.dumps(value))
    problems = problems_of(configure(model={"path": str(folder)}))
    assert any(problem.startswith("model.path:") and part in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("stage", "choice", "blocks", "everything"),
    [
        ("pretrain", "auto", {2, 5}, False),
        ("pretrain", "new", {2, 5}, False),
        ("pretrain", "last-added", {2, 5}, False),
        ("pretrain", [5], {5}, False),
        ("pretrain", "all", set(), True),
        ("sft", "auto", set(), True),
        ("sft", "new", {2, 5}, False),
        ("sft", [0, 1], {0, 1}, False),
    ],
)
def test_trainable_is_resolved(
    configure: Configure, stage: str, choice: Any, blocks: set[int], everything: bool
) -> None:
    trainable = facts_of(configure(model={"trainable": choice}), stage).trainable
    assert (set(trainable.blocks), trainable.everything) == (blocks, everything)


def test_new_and_last_added_differ_after_a_second_expansion(configure: Configure, grown: Path, tmp_path: Path) -> None:
    record = expand(str(grown), tmp_path / "twice", new_blocks=1, placement="suffix")
    assert record.new_blocks == (6,) and record.lineage[0].new_blocks == (2, 5)
    twice = {"path": str(tmp_path / "twice")}
    assert facts_of(configure(model={**twice, "trainable": "last-added"})).trainable.blocks == {6}
    assert facts_of(configure(model={**twice, "trainable": "new"})).trainable.blocks == {2, 5, 6}
    assert facts_of(configure(model={**twice, "trainable": "expansion-1"})).trainable.blocks == {2, 5}
    assert facts_of(configure(model={**twice, "trainable": "expansion-2"}), "sft").trainable.blocks == {6}


def test_an_expansion_that_never_was_is_refused_with_those_that_were(
    configure: Configure, grown: Path, tmp_path: Path
) -> None:
    expand(str(grown), tmp_path / "twice", new_blocks=1, placement="prefix")
    problem = only_problem(configure(model={"path": str(tmp_path / "twice"), "trainable": "expansion-3"}))
    assert problem.startswith("model.trainable:") and "has no expansion-3" in problem
    assert "expansion-1 added blocks 3, 6; expansion-2 added blocks 0" in problem
    plain = {"path": str(grown.parent / "base"), "trainable": "expansion-1"}
    assert "'expansion-1' needs the record" in only_problem(configure(model=plain))


def test_blocks_that_do_not_exist_are_refused(configure: Configure) -> None:
    problem = only_problem(configure(model={"trainable": [2, 6, 9]}))
    assert problem.startswith("model.trainable:") and "6, 9 don't exist" in problem and "0 to 5" in problem


def test_new_blocks_of_a_model_without_a_record_are_refused(configure: Configure, grown: Path) -> None:
    plain = {"path": str(grown.parent / "base")}
    problem = only_problem(configure(model=plain))
    assert problem.startswith("model.trainable:") and "expansion.json" in problem and "expand the model" in problem
    assert facts_of(configure(model={**plain, "trainable": [3]})).trainable.blocks == {3}
    assert facts_of(configure(model=plain), "sft").trainable.everything


@pytest.mark.parametrize(
    ("stored", "precision", "allow_cast", "refused"),
    [
        ("float32", "bf16", False, True),
        ("float32", "bf16", True, False),
        ("float32", "float32", False, False),
        ("bfloat16", "bf16", False, False),
        ("bfloat16", "float32", False, False),
        ("float16", "bf16", False, True),
        ("float16", "float32", False, False),
    ],
)
def test_weights_that_would_be_rounded_are_refused(
    configure: Configure, tmp_path: Path, stored: str, precision: str, allow_cast: bool, refused: bool
) -> None:
    folder = save_tiny_llama(tmp_path / "model", dtype=getattr(torch, stored))
    config = configure(
        model={"path": str(folder), "trainable": "all", "allow_cast": allow_cast}, engine={"precision": precision}
    )
    if refused:
        assert only_problem(config).startswith(f"engine.precision: {precision} would round the {stored} weights")
    else:
        facts_of(config)


def test_router_biases_that_stay_float32_are_no_reason_to_refuse_bf16(configure: Configure, tmp_path: Path) -> None:
    (row,) = [row for row in MIXTURES if row.name == "dots1"]
    folder = row.save(tmp_path / "model", vocab_size=320)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    rounded = {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config = configure(model={"path": str(folder), "trainable": "all"}, engine={"precision": "bf16"})
    facts_of(config)
    save_file({**rounded, "model.norm.weight": weights["model.norm.weight"]}, folder / "model.safetensors")
    assert only_problem(config).startswith("engine.precision: bf16 would round the float32 weights")


def test_the_older_rope_field_is_named_where_it_is_the_one(configure: Configure, grown: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    for file in (grown.parent / "base").iterdir():
        (folder / file.name).symlink_to(file)
    config = orjson.loads((folder / "config.json").read_bytes())
    config.pop("rope_parameters")
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(orjson.dumps(config))
    model = {"path": str(folder), "trainable": "all"}
    assert "set rope_scaling" in only_problem(configure(model=model, data={"sequence_length": 257}))
    facts_of(configure(model=model, data={"sequence_length": 256}))


def test_the_identity_of_a_tokenizer_is_that_of_transformers(grown: Path) -> None:
    other = AutoTokenizer.from_pretrained(grown)
    added = {token.content: index for index, token in other.added_tokens_decoder.items()}
    expected = tokenizer_identity(added, lambda text: other(text, add_special_tokens=False)["input_ids"])
    assert model_tokenizer_identity(grown) == expected


def test_a_damaged_tokenizer_is_one_problem(configure: Configure, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    config = configure(model={"path": str(folder), "trainable": "all"})
    assert "tokenizer.json can't be read" in only_problem(config)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in only_problem(config)


def test_ids_beyond_the_embedding_are_refused(configure: Configure, grown: Path, tmp_path: Path) -> None:
    wide = write_dataset(tmp_path / "wide", model_tokenizer_identity(grown), vocabulary=400)
    problem = only_problem(configure(data={"sources": {"wide": {"path": str(wide), "weight": 1}}}))
    assert "ids up to 399" in problem and "320" in problem


def test_a_source_without_training_documents_is_refused(configure: Configure, grown: Path, tmp_path: Path) -> None:
    empty = write_dataset(tmp_path / "empty", model_tokenizer_identity(grown), train=0)
    assert "no training documents" in only_problem(
        configure(data={"sources": {"e": {"path": str(empty), "weight": 1}}})
    )


def test_validation_sets_are_sources_with_held_out_text_or_named_datasets(
    configure: Configure, grown: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    bare = write_dataset(tmp_path / "bare", model_tokenizer_identity(grown), heldout=0)
    sources = {**data, "bare": {"path": str(bare), "weight": 0.1}}
    facts = facts_of(configure(data={"sources": sources}))
    assert list(facts.validation_sets) == ["law", "wiki"]
    assert any("bare has no held-out documents" in warning for warning in facts.warnings)
    named = configure(validation={"sets": {"general": data["wiki"]["path"]}})
    assert list(facts_of(named).validation_sets) == ["general"]
    assert "no held-out documents" in only_problem(configure(validation={"sets": {"bare": str(bare)}}))
    assert facts_of(configure(validation={"sets": {}})).validation_sets == {}


def test_a_source_that_runs_out_is_warned_of_with_step_and_epochs(configure: Configure) -> None:
    # A step is 8 × 64 = 512 tokens; law gets 80 % of them, wiki 20 %, and each has 1,000.
    warnings = facts_of(configure(schedule={"steps": 40})).warnings
    assert "data.sources.law: its 1,000 tokens run out at step 3; the run sees them 16.4 times" in warnings
    assert "data.sources.wiki: its 1,000 tokens run out at step 10; the run sees them 4.1 times" in warnings
    assert not any("run out" in warning for warning in facts_of(configure(schedule={"steps": 2})).warnings)


def test_stages_are_counted_where_a_source_runs_out(configure: Configure, data: dict[str, Any]) -> None:
    # Of 512 tokens a step, law takes 410 for 2 steps, then rests, then takes all from the seventh on.
    stages = [{"from_step": 2, "weights": {"wiki": 1}}, {"from_step": 6, "weights": {"law": 1}}]
    chosen = configure(schedule={"steps": 7}, data={"sources": data, "sequence_length": 64, "stages": stages})
    warnings = facts_of(chosen).warnings
    assert "data.sources.law: its 1,000 tokens run out at step 7; the run sees them 1.3 times" in warnings
    assert "data.sources.wiki: its 1,000 tokens run out at step 4; the run sees them 2.3 times" in warnings


def test_steps_until_the_repeats_end_are_left_to_the_packs(configure: Configure, data: dict[str, Any]) -> None:
    repeated = {name: {"path": source["path"], "repeat": 2} for name, source in data.items()}
    facts = facts_of(configure(data={"sources": repeated}, schedule={"steps": "auto"}))
    assert facts.steps is None and facts.warnings == ()


@pytest.mark.parametrize(
    ("world_size", "global_sequences", "micro", "accumulation", "padding"),
    [(2, 8, 2, 2, None), (2, 8, 3, 2, "33%"), (3, 8, 1, 3, "11%"), (4, 2, 1, 1, "50%"), (1, 7, 2, 4, "12%")],
)
def test_any_number_of_ranks_is_allowed_and_padding_is_warned_of(
    configure: Configure,
    world_size: int,
    global_sequences: int,
    micro: int,
    accumulation: int,
    padding: str | None,
) -> None:
    config = configure(batch={"global_sequences": global_sequences, "micro_sequences": micro})
    facts = facts_of(config, world_size=world_size)
    assert (facts.micro_sequences, facts.accumulation_steps) == (micro, accumulation)
    told = [warning for warning in facts.warnings if warning.startswith("batch.global_sequences")]
    assert ([padding in warning for warning in told] == [True]) if padding else not told


def test_settings_without_effect_are_warned_of(configure: Configure) -> None:
    config = configure(schedule={"decay_fraction": 0.5}, objective={"sets": ["wiki"]})
    assert {warning.partition(":")[0] for warning in facts_of(config).warnings} == {
        "schedule.decay_fraction",
        "objective.sets",
    }


def test_auto_takes_the_stage_that_fits_the_device(configure: Configure, tmp_path: Path) -> None:
    buckets = dict.fromkeys(("reduce_bucket_size", "stage3_max_live_parameters"), 1000)
    (tmp_path / "small.json").write_bytes(orjson.dumps({"zero_optimization": buckets}))
    engine = {"precision": "float32", "deepspeed": str(tmp_path / "small.json")}
    config = configure(batch={"micro_sequences": 1}, engine=engine)
    facts = facts_of(config, world_size=8)
    memories = {stage: facts.job.memory(stage, 1).total for stage in (1, 2, 3)}
    assert memories[1] > memories[2] > memories[3]
    for stage, needed in memories.items():
        device = Device("cpu", int(needed / 0.9) + 1, None, None)
        assert facts_of(config, world_size=8, device=device).zero_stage == stage
    crowded = facts_of(config, world_size=8, device=Device("cpu", 1000, None, None))
    assert crowded.zero_stage == 3 and any("GiB per rank are needed" in warning for warning in crowded.warnings)


def test_a_stated_number_of_bytes_is_kept_by_recomputing_blocks(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    def limited(gib: float | str) -> RunConfig:
        engine = {"precision": "float32", "activation_memory_gib": gib}
        return configure(batch={"global_sequences": 8, "micro_sequences": 4}, engine=engine)

    needed = facts_of(limited("unlimited")).memory.activations / GIB
    assert facts_of(limited("auto")).recomputed == facts_of(limited(needed)).recomputed == frozenset()
    config = limited(0.6 * needed)
    facts = facts_of(config)
    assert facts.recomputed and facts.memory.activations <= 0.6 * needed * GIB
    show_plan(config, facts)
    shown = capsys.readouterr().out
    assert f"{len(facts.recomputed)} of 4 blocks, +" in shown
    assert re.search(rf"host memory of a save.*{re.escape(in_gib(facts.memory.optimizer))} GiB per rank", shown)
    with pytest.raises(UserError, match="engine.activation_memory_gib: .* can't hold the activations of 4 × 64 tokens"):
        facts_of(limited(0.01 * needed))


def test_auto_recomputes_blocks_when_the_device_is_too_small_otherwise(configure: Configure) -> None:
    config = configure(batch={"global_sequences": 8, "micro_sequences": 4})
    needed = facts_of(config, world_size=1).memory
    enough = Device("cpu", int(needed.total / 0.9) + 1, None, None)
    small = Device("cpu", int((needed.total - 0.3 * needed.activations) / 0.9), None, None)
    assert not facts_of(config, world_size=1, device=enough).recomputed
    facts = facts_of(config, world_size=1, device=small)
    assert facts.recomputed and not [warning for warning in facts.warnings if "GiB per rank" in warning]


def test_the_dry_run_prints_the_plan(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure()
    show_plan(config, facts_of(config))
    page = capsys.readouterr().out
    for part in ("that learn", "ZeRO-3", "micro-batch", "source law", "1,000 tokens", "held out wiki", "gradients"):
        assert part in page
