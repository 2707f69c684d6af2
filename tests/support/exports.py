"""A finished tiny run on disk, made without training: an expanded model, a checkpoint with known masters, metrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file

from llamapro.checkpoint.save import save_checkpoint
from llamapro.expansion.expand import expand
from llamapro.expansion.families import family_named, parse_block_index
from llamapro.expansion.record import ExpansionRecord
from llamapro.files.tensors import TensorFolder
from llamapro.ranks import Ranks
from tests.support.checkpoint import KEYS, SlicedState
from tests.support.models import save_tiny_llama

STEP = 12
BASE_ID = "tests/tiny-llama"


@dataclass(frozen=True)
class TinyRun:
    """Where everything lies, and the masters that the checkpoint holds."""

    base: Path
    model: Path
    folder: Path
    checkpoint: Path
    record: ExpansionRecord
    masters: dict[str, torch.Tensor]


def make_run(
    root: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    everything: bool = False,
    base_id: str = BASE_ID,
    base: Path | None = None,
) -> TinyRun:
    """4 → 6 blocks of a tiny llama or `base`; the new ones (or everything) got random float32 masters at step 12."""
    if base is None:
        base = save_tiny_llama(root / "base", dtype=dtype, tied=tied)
        (base / "LICENSE").write_text("Terms of the tiny llama.\n")
    record = expand(str(base), root / "model", new_blocks=2, base_id=base_id)
    shapes = {name: entry.shape for name, entry in TensorFolder.open(root / "model").entries.items()}
    names = [name for name in shapes if everything or block_of(record, name) in record.new_blocks]
    masters = random_masters({name: shapes[name] for name in names})
    folder = root / "run"
    checkpoint = write_checkpoint(folder, masters, record)
    write_run_files(folder, root / "model")
    return TinyRun(base, root / "model", folder, checkpoint, record, masters)


def block_of(record: ExpansionRecord, name: str) -> int | None:
    return parse_block_index(family_named(record.family), name)


def random_masters(shapes: dict[str, tuple[int, ...]], seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def write_checkpoint(
    run: Path, masters: dict[str, torch.Tensor], record: ExpansionRecord | None, step: int = STEP
) -> Path:
    shapes = {name: tuple(master.shape) for name, master in masters.items()}
    values = {name: dict.fromkeys(KEYS, master.flatten()) for name, master in masters.items()}
    state = SlicedState(values, shapes=shapes)
    return save_checkpoint(run / "checkpoints", step, state, {}, record, Ranks.solo())


def write_run_files(run: Path, model: Path) -> None:
    """config.yaml and metrics.jsonl as a run writes them."""
    (run / "config.yaml").write_text(
        f"run: {{folder: {run}, seed: 7}}\n"
        f"model: {{path: {model}}}\n"
        "data:\n  sequence_length: 64\n  sources:\n"
        "    law: {path: nowhere/law, weight: 0.8}\n    wiki: {path: nowhere/wiki, weight: 0.2}\n"
        f"schedule: {{steps: {STEP}, learning_rate: 0.0005}}\n"
    )
    lines: list[dict[str, Any]] = [{"event": "start", "time": "2026-01-02T03:04:05+0000"}, validation(0, 1.25, 1.5)]
    lines += [step_line(step) for step in range(1, STEP + 1)]
    lines += [validation(STEP, 1.0, 1.4925), {"event": "proof", "equal": 38, "total": 38}]
    (run / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def step_line(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 4.0 - step / 10,
        "loss/law": 4.1 - step / 10,
        "loss/wiki": 3.9 - step / 20,
        "learning_rate": 5e-4 / step,
        "gradient_norm": 1.0 + 1 / step,
        "tokens_per_second_per_gpu": 250.0 + step,
        "memory_gib": 1.5,
        "data_wait_fraction": 0.01,
        "step_seconds": 2.0,
        "tokens": 512.0 * step,
    }


def validation(step: int, law: float, wiki: float) -> dict[str, float]:
    scores = {"law": law, "wiki": wiki}
    losses = {f"validation/{name}/loss": 2.5 * bits for name, bits in scores.items()}
    return {"step": step} | losses | {f"validation/{name}/bits_per_byte": bits for name, bits in scores.items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, as the safetensors library reads it."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
