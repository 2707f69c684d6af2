"""Engines on tiny models for distributed tests: built, trained and looked at inside worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from llamapro.config.root import RunConfig
from llamapro.engine.engine import Engine, StepResult
from llamapro.modeling.build import build_model
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.trainable import Adapters, TrainableSet
from llamapro.ranks import Ranks
from tests.support.modeling import IGNORED, Rows, packed_rows

LEARNING_RATE = 5e-4
SEQUENCES = 6
ROW_LENGTHS = ([40, 24], [64], [10, 30, 24], [5, 59], [32, 32], [1, 63])
KEYS = ("master", "exp_avg", "exp_avg_sq")

Array = NDArray[np.float32]
State = dict[tuple[str, str], Array]


@dataclass(frozen=True)
class Setup:
    """How an engine is started.

    Attributes:
        persist: stage 3 keeps parameters of up to this many elements whole on every rank.
        micro: rows per micro-batch.
        adapter_rank: of adapters that learn instead of the blocks; 0: the blocks do.
    """

    folder: str
    stage: int
    precision: str = "float32"
    blocks: tuple[int, ...] = (2, 4)
    micro: int = 1
    accumulation: int = 3
    persist: int = 0
    clip: float | None = 1.0
    offload: str = "none"
    betas: tuple[float, float] = (0.9, 0.95)
    overlay: dict[str, Any] = field(default_factory=dict)
    adapter_rank: int = 0

    @property
    def trainable(self) -> TrainableSet:
        """What learns."""
        if self.adapter_rank:
            return TrainableSet.of_adapters(self.blocks, Adapters(self.adapter_rank, 2.0 * self.adapter_rank))
        return TrainableSet.of(self.blocks) if self.blocks else TrainableSet.all()


def run_config(setup: Setup, scratch: Path) -> RunConfig:
    """The run configuration of a setup; its overlay file goes into `scratch`."""
    overlay = {"zero_optimization": {}, **setup.overlay}
    overlay["zero_optimization"] = {"stage3_param_persistence_threshold": setup.persist, **overlay["zero_optimization"]}
    path = scratch / "deepspeed.json"
    path.write_bytes(orjson.dumps(overlay))
    return RunConfig.model_validate(
        {
            "model": {"path": setup.folder},
            "data": {"sources": {"law": {"path": "data/law", "weight": 1.0}}},
            "optimizer": {"gradient_clip_norm": setup.clip, "weight_decay": 0.1, "betas": setup.betas},
            "engine": {
                "precision": setup.precision,
                "offload": setup.offload,
                "startup_timeout_minutes": 1.0,
                "deepspeed": str(path),
            },
        }
    )


def start_engine(ranks: Ranks, setup: Setup) -> tuple[Engine, LanguageModel]:
    """Build the model and put it under an engine."""
    scratch = Path(setup.folder) / f"rank{ranks.rank}"
    scratch.mkdir(exist_ok=True)
    config = run_config(setup, scratch)
    model = build_model(
        Path(setup.folder),
        dtype=torch.float32 if setup.precision == "float32" else torch.bfloat16,
        device=ranks.device,
        trainable=setup.trainable,
        record=None,
        when_filled=Engine.partitioner(config, setup.stage),
    )
    engine = Engine.start(
        model,
        model.trainable_parameters(),
        config,
        ranks,
        zero_stage=setup.stage,
        micro_sequences=setup.micro,
        accumulation_steps=setup.accumulation,
    )
    return engine, model


def global_rows(step: int) -> Rows:
    """The `SEQUENCES` rows of a step, of 64 tokens each, whatever the number of ranks."""
    return packed_rows([list(lengths) for lengths in ROW_LENGTHS], seed=step)


def rank_batches(step: int, ranks: Ranks, setup: Setup) -> Iterator[Rows]:
    """This rank's share of the step's rows in micro-batches, filled up with rows without loss."""
    inputs, labels, positions = global_rows(step)
    low = SEQUENCES * ranks.rank // ranks.world_size
    high = SEQUENCES * (ranks.rank + 1) // ranks.world_size
    for index in range(setup.accumulation):
        chosen = [low + index * setup.micro + row for row in range(setup.micro)]
        real = torch.tensor([place < high for place in chosen])
        places = torch.tensor([min(place, SEQUENCES - 1) for place in chosen])
        empty = torch.full_like(labels[places], IGNORED)
        yield inputs[places], torch.where(real[:, None], labels[places], empty), positions[places]


def accumulate(engine: Engine, ranks: Ranks, setup: Setup, step: int, micro_batches: int | None = None) -> float:
    """Forward and backward over the step's micro-batches, or the first few; this rank's mean-loss part."""
    tokens = int((global_rows(step)[1] != IGNORED).sum())
    total = 0.0
    for rows in list(rank_batches(step, ranks, setup))[:micro_batches]:
        output = engine.forward_loss(*rows)
        engine.backward(output.loss_sum, tokens)
        total += output.loss_sum.item()
    return total / tokens


def train_step(engine: Engine, ranks: Ranks, setup: Setup, step: int) -> tuple[float, StepResult]:
    """One whole step: the global mean loss, and what the step did."""
    (loss,) = ranks.sum([accumulate(engine, ranks, setup, step)])
    return loss, engine.step(LEARNING_RATE)


def local_state(engine: Engine) -> list[tuple[str, int, tuple[int, ...], dict[str, Array]]]:
    """This rank's fragments as copies: (name, start, shape, values by key)."""
    return [
        (part.name, part.start, part.shape, {key: value.cpu().numpy().copy() for key, value in part.tensors.items()})
        for part in engine.fragments()
    ]


def joined(parts: list[list[tuple[str, int, tuple[int, ...], dict[str, Array]]]]) -> State:
    """Whole tensors by (name, key) from the fragments of all ranks; every element must occur exactly once."""
    whole: State = {}
    seen: dict[str, NDArray[np.int64]] = {}
    for name, start, shape, values in (part for rank in parts for part in rank):
        count = len(values["master"])
        seen.setdefault(name, np.zeros(int(np.prod(shape)), np.int64))[start : start + count] += 1
        for key in KEYS:
            flat = whole.setdefault((name, key), np.full(int(np.prod(shape)), np.nan, np.float32))
            flat[start : start + count] = values[key]
    for name, counts in seen.items():
        assert (counts == 1).all(), f"{name}: elements occur {sorted(set(counts.tolist()))} times"
    return whole


def whole_parameters(model: LanguageModel) -> dict[str, Array]:
    """Every live parameter whole, as this rank computes with it, in float32. Collective at stage 3."""
    import deepspeed  # type: ignore[import-untyped]

    found = {}
    for name, parameter in model.hf.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters(parameter):
                found[name] = parameter.detach().float().numpy().copy()
        else:
            found[name] = parameter.detach().float().numpy().copy()
    return found
