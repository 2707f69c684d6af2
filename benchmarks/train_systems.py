"""One system of `train_cpu` in one process: load, train some steps, print what they took as JSON.

python -m benchmarks.train_systems NAME WORK FOLDER '{"rows": 4, "length": 512, "steps": 6, "warmup": 3}'
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.train_cpu import EAGER, OURS
from llamapro.config.load import load_config
from llamapro.config.root import RunConfig
from llamapro.data.batches import Batch
from llamapro.data.dataset import Dataset
from llamapro.data.heldout import heldout_batches
from llamapro.expansion.families import family_of, parse_block_index
from llamapro.expansion.record import read_record
from llamapro.expansion.source import read_config

CORPORA = {"hpo": 0.5, "wiki": 0.5}
PADDED_DOCUMENTS = 8
LEARNING_RATE = 1e-4
RUN = """
run: {{folder: {folder}/run}}
model: {{path: {work}/expanded}}
data:
  sequence_length: {length}
  sources:
    hpo: {{path: {work}/data/hpo, weight: 1}}
    wiki: {{path: {work}/data/wiki, weight: 1}}
validation: {{sequences: 1}}
batch: {{global_sequences: {rows}, micro_sequences: {micro}}}
schedule: {{steps: 100, learning_rate: 1e-4}}
engine: {{zero_stage: 1, precision: bf16, compile: "{compile}"}}
"""


@dataclass(frozen=True)
class Settings:
    """How much to train: packed rows of a step and their tokens, timed steps, and steps before those.

    Attributes:
        micro: rows of a micro-batch of ours; "auto": as the planner chooses.
    """

    rows: int
    length: int
    steps: int
    warmup: int
    micro: int | Literal["auto"] = "auto"


class Clock:
    """Seconds of every step; memory from when the model was loaded.

    Args:
        loaded: resident bytes then; None: now.
    """

    def __init__(self, loaded: int | None = None) -> None:
        self.seconds: list[float] = []
        self._loaded = resident_bytes() if loaded is None else loaded
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._began = time.perf_counter()

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """It is over."""
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def bytes_above_model(self) -> int:
        """Largest resident size since, less the size then."""
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = [line for line in lines if line.startswith("VmHWM:")]
        return int(peak.split()[1]) * 1024 - self._loaded


def resident_bytes() -> int:
    """Memory of this process."""
    return int(psutil.Process().memory_info().rss)


def batches(work: Path, settings: Settings) -> list[Batch]:
    """The same packed rows for every system: half of a step's from each corpus, in its shuffled order."""
    each = settings.rows // len(CORPORA)
    count = (settings.steps + settings.warmup) * each
    found = [
        [
            batch
            for batch, _ in heldout_batches(Dataset.open(work / "data" / name), settings.length, count, each, "train")
        ]
        for name in CORPORA
    ]
    return [joined(parts) for parts in zip(*found, strict=True)]


def joined(parts: tuple[Batch, ...]) -> Batch:
    """Rows of several batches in one."""
    return Batch(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        position_ids=np.concatenate([part.position_ids for part in parts]),
        sources=np.concatenate([part.sources for part in parts]),
        valid_tokens=sum(part.valid_tokens for part in parts),
    )


def micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of so many rows."""
    for low in range(0, batch.rows, rows):
        labels = batch.labels[low : low + rows]
        yield Batch(
            input_ids=batch.input_ids[low : low + rows],
            labels=labels,
            position_ids=batch.position_ids[low : low + rows],
            sources=batch.sources[low : low + rows],
            valid_tokens=int((labels >= 0).sum()),
        )


def documents(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input ids, labels) of every document in a batch that has a target."""
    ids, labels = batch.input_ids.ravel(), batch.labels.ravel()
    for low, high in zip(batch.boundaries, batch.boundaries[1:], strict=False):
        if (labels[low:high] >= 0).any():
            yield ids[low:high], labels[low:high]


def frozen_but_new(work: Path) -> PreTrainedModel:
    """The expanded model in bf16, as transformers loads it; only the new blocks learn."""
    folder = work / "expanded"
    record, family = read_record(folder), family_of(read_config(folder))
    assert record is not None
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parse_block_index(family, name) in record.new_blocks)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What learns."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def next_token_labels(batch: Batch) -> torch.Tensor:
    """Labels as transformers wants them, which shifts them itself."""
    labels = np.full_like(batch.labels, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    return torch.from_numpy(labels)


def run_loop(work: Path, folder: Path, settings: Settings) -> Clock:
    """A plain torch loop."""
    model = frozen_but_new(work)
    optimizer = torch.optim.AdamW(trainable(model), lr=LEARNING_RATE)
    clock = Clock()
    for batch in batches(work, settings):
        clock.begin()
        logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits
        targets = torch.from_numpy(batch.labels).flatten()
        F.cross_entropy(logits.float().flatten(0, 1), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
    return clock


def run_padded(work: Path, folder: Path, settings: Settings) -> Clock:
    """One document a row, some rows at a time; the embeddings' outputs need gradients."""
    model = frozen_but_new(work)
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trainable(model), lr=LEARNING_RATE)
    clock = Clock()
    for batch in batches(work, settings):
        found = list(documents(batch))
        clock.begin()
        for low in range(0, len(found), PADDED_DOCUMENTS):
            rows = found[low : low + PADDED_DOCUMENTS]
            ids, labels, mask = padded(rows)
            logits = model(input_ids=ids, attention_mask=mask).logits
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            (losses / batch.valid_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
    return clock


def padded(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, labels, mask), each (rows, longest)."""
    pad = nn.utils.rnn.pad_sequence
    ids, labels = ([torch.from_numpy(row[part]) for row in rows] for part in (0, 1))
    ones = [torch.ones_like(row) for row in ids]
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100), pad(ones, batch_first=True)


def run_trainer(work: Path, folder: Path, settings: Settings) -> Clock:
    """transformers' Trainer."""
    model = frozen_but_new(work)
    rows = [
        {"input_ids": torch.from_numpy(ids), "labels": labels}
        for batch in batches(work, settings)
        for ids, labels in zip(batch.input_ids, next_token_labels(batch), strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.rows,
        max_steps=settings.steps + settings.warmup,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    clock = Clock()

    class Times(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Times()]).train()
    return clock


def run_ours(work: Path, folder: Path, settings: Settings, compile_blocks: str) -> Clock:
    """As `launch/pretrain.py` trains."""
    from llamapro.engine.start import start_ranks, stop_ranks
    from llamapro.training.opening import start_engine
    from llamapro.training.preflight import check_facts
    from llamapro.training.step import to_device

    path = folder / "run.yaml"
    path.write_text(
        RUN.format(
            folder=folder,
            work=work.resolve(),
            rows=settings.rows,
            length=settings.length,
            micro=settings.micro,
            compile=compile_blocks,
        )
    )
    config: RunConfig = load_config(path)
    facts = check_facts(config, "pretrain", 1)
    ranks = start_ranks(config.engine)
    before = resident_bytes()
    engine = start_engine(config, facts, ranks, facts.accumulation_steps).engine
    # The optimizer's state is made along with the model: it counts as above it.
    clock = Clock(before + sum(parameter.nbytes for parameter in engine.model.parameters()))
    for batch in batches(work, settings):
        clock.begin()
        for part in micro_batches(batch, facts.micro_sequences):
            inputs, _ = to_device(part, ranks.device)
            engine.backward(engine.forward_loss(*inputs).loss_sum, batch.valid_tokens)
        engine.step(LEARNING_RATE)
        clock.end()
    engine.close()
    stop_ranks()
    return clock


def run(name: str, work: Path, folder: Path, settings: Settings) -> Clock:
    """Train with a system by its name."""
    if name in (OURS, EAGER):
        return run_ours(work, folder, settings, "on" if name == OURS else "off")
    return {"trainer": run_trainer, "padded": run_padded, "loop": run_loop}[name](work, folder, settings)


def measured(name: str, work: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """What a run took."""
    clock = run(name, work, folder, settings)
    used = batches(work, settings)[settings.warmup :]
    tokens = statistics.mean(batch.valid_tokens for batch in used)
    lengths = sorted(len(ids) for batch in used for ids, _ in documents(batch))
    middle = f"{lengths[len(lengths) // 10]}, {lengths[len(lengths) // 2]}, {lengths[len(lengths) * 9 // 10]}"
    return {
        "seconds": clock.seconds,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / statistics.median(clock.seconds[settings.warmup :]),
        "bytes_above_model": clock.bytes_above_model,
        "corpus": "phenotype definitions and Wikipedia articles, half the rows each",
        "documents": f"documents of {middle} tokens (10th, 50th, 90th percentile)",
    }


if __name__ == "__main__":
    _, chosen, work_folder, run_folder, options = sys.argv
    with redirect_stdout(sys.stderr):
        outcome = measured(chosen, Path(work_folder), Path(run_folder), Settings(**json.loads(options)))
    sys.stdout.write(json.dumps(outcome) + "\n")
