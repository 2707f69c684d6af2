"""Training runs of known shapes for benchmarks: random weights in a folder, and everything a run starts from.

Models, engines and steps are those of the trainer; only the text is missing, for which random tokens stand.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llamapro.config.root import RunConfig
from llamapro.expansion.families import family_of
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.plan import choose, usable_bytes
from llamapro.planning.run_job import job_of_run
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.training.device import Device
from llamapro.training.preflight import Facts

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained.

    Attributes:
        sizes: of its configuration.
        learning: ids of the new blocks.
        sequences: of a rank and step at most.
    """

    sizes: Mapping[str, int]
    learning: tuple[int, ...]
    sequence_length: int
    sequences: int

    @property
    def config(self) -> LlamaConfig:
        """As transformers builds it."""
        return LlamaConfig(
            **self.sizes, num_key_value_heads=self.sizes["num_attention_heads"], tie_word_embeddings=False
        )


def _workload(
    hidden: int, intermediate: int, heads: int, blocks: int, vocabulary: int, length: int, sequences: int
) -> Workload:
    """With one new block behind every four."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
    }
    return Workload(sizes, tuple(range(4, blocks, 5)), length, sequences)


WORKLOADS: Mapping[str, Workload] = {
    "llama2-7b": _workload(4096, 11008, 32, 40, 32000, 4096, 48),
    "1b": _workload(2048, 5632, 32, 25, 32000, 2048, 64),
    "small": _workload(512, 1376, 8, 15, 8192, 512, 8),
    "tiny": _workload(64, 176, 4, 10, 320, 64, 4),
}


def write_model(folder: Path, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
    """Write a model of random weights, made on the device, one file per block; nothing if it is there.

    All blocks are alike: what they compute takes as long as if they weren't.
    """
    if (folder / INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(workload.config)  # type: ignore[no-untyped-call]
    workload.config.save_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    first = {name: _random(name, shape, dtype, device) for name, shape in shapes.items() if _block(name) in ("", "0")}
    places: dict[str, str] = {}
    for block in ("", *map(str, range(workload.sizes["num_hidden_layers"]))):
        file = f"model-{block or 'outside'}.safetensors"
        names = [name for name in shapes if _block(name) == block]
        save_file({name: first[_of_first_block(name)] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def run_config(folder: Path, workload: Workload, world_size: int = 1, **engine: Any) -> RunConfig:
    """The run configuration of a benchmark.

    Args:
        engine: the section.
    """
    return RunConfig.model_validate(
        {
            "run": {"folder": str(folder / "run")},
            "model": {"path": str(folder), "trainable": list(workload.learning)},
            "data": {
                "sequence_length": workload.sequence_length,
                "sources": {"random": {"path": str(folder), "weight": 1.0}},
            },
            "batch": {"global_sequences": workload.sequences * world_size},
            "engine": engine,
        }
    )


def run_facts(
    config: RunConfig, workload: Workload, device: Device, world_size: int = 1, micro_sequences: int | None = None
) -> Facts:
    """What a run starts from, as preflight would find it, with no data.

    Args:
        micro_sequences: None: the planner's choice.
    """
    values = workload.config.to_dict()
    trainable = TrainableSet.of(workload.learning)
    shape = DecoderShape.from_config(values)
    job = job_of_run(config, shape, Learning(trainable.blocks), world_size, device.kind)
    stage = config.engine.zero_stage
    choice = choose(
        job,
        budget_bytes=usable_bytes(device.memory_bytes),
        zero_stage=None if stage == "auto" else stage,
        micro_sequences=micro_sequences,
        most_micro_tokens=device.most_micro_tokens,
    )
    return Facts(
        stage="pretrain",
        world_size=world_size,
        model_folder=config.model.path,
        model_config=values,
        family=family_of(values),
        record=None,
        trainable=trainable,
        sources={},
        validation_sets={},
        sequence_length=workload.sequence_length,
        steps=None,
        zero_stage=choice.zero_stage,
        micro_sequences=choice.micro_sequences,
        accumulation_steps=choice.accumulation_steps,
        recomputed=choice.recomputed,
        job=job,
        flops=job.flops(choice.recomputed),
        memory=choice.memory,
        device=device,
        tokenizer_identity="",
        warnings=(),
    )


def _random(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator(device).manual_seed(sum(name.encode()))
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return (values / math.sqrt(shape[-1])).to(dtype).cpu()


def _block(name: str) -> str:
    """The number of a parameter's block; empty outside the blocks."""
    head, _, rest = name.partition("model.layers.")
    return rest.partition(".")[0] if not head else ""


def _of_first_block(name: str) -> str:
    block = _block(name)
    return name.replace(f"model.layers.{block}.", "model.layers.0.", 1) if block else name
