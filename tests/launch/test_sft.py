"""Instruction tuning: only answers are learned, by all weights, at every ZeRO stage; stopped, continued, exported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.chat.options import ChatRequest
from llamapro.cli.main import main
from llamapro.config.root import RunConfig
from llamapro.data.dataset import Dataset
from llamapro.errors import ConfigError
from llamapro.expansion.expand import expand
from llamapro.expansion.record import read_record
from llamapro.training.preflight import check_facts
from tests.support.chats import build_chats, write_rows
from tests.support.families import MIXTURES
from tests.support.models import save_tiny_llama, tiny_tokenizer
from tests.support.pool import WorkerError, WorkerPool
from tests.support.source import ROOT
from tests.support.training import losses, run_training, state_digest, trained_weights

TIMEOUT_SECONDS = 180
GLOBAL_SEQUENCES = 24
LOSS_TOLERANCE = 1e-5
STAGE_TOLERANCE = 1e-6


def conversation(number: int) -> list[dict[str, str]]:
    """Questions differ, answers follow from them."""
    turns = []
    for turn in range(1 + number % 2):
        turns.append({"role": "user", "content": f"Double {number} {turn} the quick brown fox"})
        turns.append({"role": "assistant", "content": f"It is {2 * number}."})
    return turns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, tied and not, an expanded one, and a dataset in their own template."""
    folder = tmp_path_factory.mktemp("sft")
    save_tiny_llama(folder / "base", blocks=2)
    save_tiny_llama(folder / "tied", blocks=2, tied=True)
    expand(str(folder / "base"), folder / "expanded", new_blocks=1)
    rows = write_rows(
        folder / "chats.jsonl", [{"messages": conversation(number)} for number in range(GLOBAL_SEQUENCES)]
    )
    build_chats([rows], folder / "base", folder / "chats", ChatRequest())
    held = write_rows(folder / "held.jsonl", [{"messages": conversation(number)} for number in range(40, 48)])
    build_chats([held], folder / "base", folder / "held", ChatRequest(), heldout=1.0)
    return folder


def settings(folder: Path, run: str, start: str = "base", **sections: Any) -> dict[str, Any]:
    """Each conversation is a row of its own, and a step sees each once."""
    values: dict[str, Any] = {
        "run": {"folder": str(folder / run), "seed": 3},
        "model": {"path": str(folder / start), "trainable": "all"},
        "data": {
            "sequence_length": 128,
            "packing": "document",
            "sources": {"chats": {"path": str(folder / "chats"), "weight": 1.0}},
        },
        "validation": {"every_steps": 6, "sequences": 8, "sets": {"held": str(folder / "held")}},
        "batch": {"global_sequences": GLOBAL_SEQUENCES, "micro_sequences": 5},
        "schedule": {"steps": 6, "learning_rate": 1e-2},
        "engine": {"precision": "float32", "zero_stage": 1},
        "checkpoint": {"every_steps": 3},
        "logging": {"trackers": []},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def launch(folder: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`launch/sft.py` as a process of its own."""
    config = folder / f"{Path(values['run']['folder']).name}.yaml"
    config.write_bytes(orjson.dumps(values))
    command = [sys.executable, str(ROOT / "launch" / "sft.py"), "--config", str(config)]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**clean, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A finished run of the expanded model, `trainable` as it is when nothing is said."""
    done = launch(folder, settings(folder, "finished", "expanded", model={"trainable": "auto"}))
    assert done.returncode == 0, done.stderr
    return folder / "finished"


def answers_loss(model: Path) -> tuple[float, int]:
    """Mean loss of the answers' tokens by transformers alone, which finds them by rendering prefixes; their number."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0

    def ids_of(messages: Any, asks: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for number in range(GLOBAL_SEQUENCES):
        messages = conversation(number)
        # The template ends with <|im_end|> and a line end, and this tokenizer's EOS is </s>: added, and learned.
        ids = [*ids_of(messages), tokenizer.eos_token_id]
        learned = torch.zeros(len(ids), dtype=torch.bool)
        for index in range(1, len(messages), 2):
            last = index == len(messages) - 1
            stop = len(ids) if last else len(ids_of(messages[: index + 1])) - 1
            learned[len(ids_of(messages[:index], asks=True)) : stop] = True
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        total += float(each[learned[1:]].sum())
        count += int(learned[1:].sum())
    return total / count, count


def test_the_first_loss_is_that_of_the_answers_and_falls(folder: Path, finished: Path) -> None:
    steps = [line for line in metrics(finished) if "gradient_norm" in line]
    loss, tokens = answers_loss(folder / "expanded")
    assert steps[0]["loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    assert steps[0]["tokens"] == tokens
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_held_out_answers_are_learned_too(finished: Path) -> None:
    held = [line["validation/held/loss"] for line in metrics(finished) if "validation/held/loss" in line]
    assert len(held) == 2 and held[-1] < 0.8 * held[0]


def test_every_weight_moved_and_the_export_says_so(folder: Path, finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    before = dict(AutoModelForCausalLM.from_pretrained(folder / "expanded", dtype=torch.float32).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).named_parameters())
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    masters = trained_weights(finished)
    assert all(torch.equal(masters[name], after[name].flatten()) for name in after)
    record = read_record(tmp_path / "out")
    assert record is not None and set(record.trained.blocks) == {0, 1, 2}
    first, _ = answers_loss(folder / "expanded")
    assert answers_loss(tmp_path / "out")[0] < 0.7 * first


@pytest.mark.parametrize("model", ["base", "tied"])
def test_stages_and_world_sizes_give_the_same_losses(folder: Path, pool: WorkerPool, model: str) -> None:
    found = {}
    for stage, world_size in [(1, 1), (1, 2), (2, 2), (3, 2)]:
        engine = {"precision": "float32", "zero_stage": stage}
        values = settings(folder, f"{model}-{stage}-{world_size}", model, engine=engine)
        found[stage, world_size] = losses(pool.run(run_training, values, world_size=world_size)[0])
    for other in found.values():
        assert other == pytest.approx(found[1, 1], rel=STAGE_TOLERANCE)
    assert state_digest(folder / f"{model}-2-2") == state_digest(folder / f"{model}-3-2")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stopped_and_continued_equals_not_stopped(folder: Path, pool: WorkerPool, stage: int) -> None:
    engine = {"precision": "float32", "zero_stage": stage}
    straight, stopped = (settings(folder, f"{name}{stage}", "tied", engine=engine) for name in ("straight", "stopped"))
    pool.run(run_training, straight, world_size=2)
    with pytest.raises(WorkerError, match="RetryLater"):
        pool.run(run_training, stopped, 4, world_size=2)
    pool.run(run_training, stopped, world_size=2)
    assert state_digest(folder / f"stopped{stage}") == state_digest(folder / f"straight{stage}")


def test_only_new_blocks_learn_when_asked(folder: Path, pool: WorkerPool) -> None:
    pool.run(run_training, settings(folder, "new", "expanded", model={"trainable": "new"}), world_size=1)
    assert {name.split(".")[2] for name in trained_weights(folder / "new")} == {"2"}


def test_adapters_beside_what_has_none_are_refused_in_one_message(folder: Path) -> None:
    (mixture,) = [row for row in MIXTURES if row.name == "mixtral"]
    tiny_tokenizer().save_pretrained(mixture.save(folder / "mixture", vocab_size=320, max_position_embeddings=128))
    lora = {"trainable": "lora", "lora": {"rank": 4, "alpha": 8}}
    config = RunConfig.model_validate(settings(folder, "lora", "mixture", model=lora))
    with pytest.raises(ConfigError) as caught:
        check_facts(config, "sft", 1)
    (problem,) = caught.value.problems
    assert problem.startswith("model.trainable: lora puts adapters beside plain linears, and in block 0 of Mixtral")


def test_conversations_that_a_sequence_can_not_hold_are_warned_about(folder: Path) -> None:
    lengths = Dataset.open(folder / "chats").split("train").shards[0].lengths()
    short = int(lengths.max()) - 1
    long = int((lengths > short).sum())
    said = f"{long} conversations are longer than data.sequence_length {short}"
    for length, expected in ((128, []), (short, [said])):
        values = settings(folder, "warned", data={"sequence_length": length})
        warnings = check_facts(RunConfig.model_validate(values), "sft", 1).warnings
        found = [text for text in warnings if "conversations" in text]
        assert len(found) == len(expected) and all(text in found[0] for text in expected)


def test_the_dataset_has_what_the_tests_say(folder: Path) -> None:
    train = Dataset.open(folder / "chats").split("train")
    assert train.documents == GLOBAL_SEQUENCES and max(train.shards[0].lengths().tolist()) <= 128
