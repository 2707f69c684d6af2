"""Measure a model folder on text sets, each measurement once: what is stored is not measured again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import llamapro
from llamapro import console
from llamapro.data.dataset import Dataset
from llamapro.data.heldout import heldout_batches
from llamapro.data.loader import Batch
from llamapro.data.rows import IGNORED
from llamapro.data.shard import SplitName
from llamapro.errors import ModelRefused
from llamapro.evaluation.model_digest import model_digest
from llamapro.evaluation.results import MeasurementKey, ModelResult, SetResult, store_measurement, stored_measurement
from llamapro.evaluation.text import TextScore, evaluate_text
from llamapro.expansion.record import read_record
from llamapro.files.tensors import FLOAT_DTYPES, TensorFolder
from llamapro.modeling.build import build_model
from llamapro.modeling.model import LanguageModel, LossOutput
from llamapro.modeling.trainable import TrainableSet
from llamapro.ranks import Ranks

TOKENS_PER_BATCH = 8192
PRECISIONS = {"bf16": "bfloat16", "float32": "float32"}
Batches = Sequence[tuple[Batch, Sequence[float]]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class TextSet:
    """Text to measure on: a split of a dataset; `given` is how the user named the dataset."""

    name: str
    given: str
    dataset: Dataset
    split: SplitName


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        sequence_length: tokens of a row.
        sequences: rows per set at most, the same ones every time.
        precision: "keep" (the folder's dtype), "bf16" or "float32".
    """

    sequence_length: int
    sequences: int
    precision: str
    device: torch.device

    def as_stored(self) -> dict[str, str | int]:
        """As result files say them."""
        return {
            "sequence_length": self.sequence_length,
            "sequences": self.sequences,
            "precision": self.precision,
            "device": self.device.type,
        }


@dataclass(frozen=True)
class Measured:
    """One model's measurements: `result` for results.json, `scores` with their rows."""

    result: ModelResult
    scores: Mapping[str, TextScore]


Scorer = Callable[[TextSet, Batches, Advance], TextScore]
OpenScorer = Callable[[Path, str, Settings], AbstractContextManager[Scorer]]


@contextmanager
def scorer_alone(folder: Path, dtype: str, settings: Settings) -> Iterator[Scorer]:
    """Scores texts with a model folder that this process alone has loaded.

    Raises:
        ModelRefused: the model can't be built; says why.
        Corrupted: a base tensor differs from the model's record; names it.
    """
    loss = loss_of(load_model(folder, dtype, settings.device), settings.device)
    yield lambda _, batches, advance: evaluate_text(loss, batches, Ranks.solo(settings.device), advance)


def measure(
    folder: Path,
    name: str,
    sets: Sequence[TextSet],
    settings: Settings,
    store: Path,
    open_scorer: OpenScorer = scorer_alone,
) -> Measured:
    """Score a model folder on every set; measurements are read from, and kept in, the folder `store`.

    Args:
        open_scorer: loads the model, when there is something to score.

    Raises:
        ModelRefused: the model can't be built; says why.
        Corrupted: a base tensor differs from the model's record; names it.
        DataError: a set has no target token.
    """
    dtype = compute_dtype(folder, settings.precision)
    digest = model_digest(folder)
    keys = {text.name: measurement_key(text, digest, dtype, settings) for text in sets}
    stored = {text.name: stored_measurement(store, keys[text.name]) for text in sets}
    missing = [text for text in sets if stored[text.name] is None]
    keep = partial(_keep, store, keys)
    fresh = _score(name, missing, settings, keep, partial(open_scorer, folder, dtype, settings)) if missing else {}
    scores = {text.name: fresh.get(text.name) or _present(stored[text.name]) for text in sets}
    results = {text.name: set_result(text, scores[text.name]) for text in sets}
    return Measured(ModelResult(name=name, digest=digest, sets=results), scores)


def compute_dtype(folder: Path, precision: str) -> str:
    """The dtype to compute in: the name of a torch dtype; "keep" is that of most of the folder's weights.

    Raises:
        ModelRefused: the weights are no floats.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    sizes: dict[str, int] = {}
    for entry in TensorFolder.open(folder).entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    stored = max(sizes, key=lambda dtype: sizes[dtype])
    if stored not in FLOAT_DTYPES:
        raise ModelRefused(f"{folder} holds weights of dtype {stored}; only unquantized models can be evaluated")
    return FLOAT_DTYPES[stored]


def program_versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    return {"llamapro": llamapro.__version__} | {name: version(name) for name in ("torch", "transformers")}


def measurement_key(text: TextSet, digest: str, dtype: str, settings: Settings) -> MeasurementKey:
    """What fixes a model's score on a text.

    Args:
        digest: of the model, and of what is changed about it.
        dtype: computed in, as `compute_dtype` says.
    """
    return MeasurementKey(
        model_digest=digest,
        dataset_fingerprint=text.dataset.fingerprint,
        split=text.split,
        sequence_length=settings.sequence_length,
        sequences=settings.sequences,
        precision=dtype,
        device=settings.device.type,
        program=" ".join(f"{name} {number}" for name, number in program_versions().items()),
    )


def _score(
    name: str,
    sets: Sequence[TextSet],
    settings: Settings,
    keep: Callable[[TextSet, TextScore], None],
    open_scorer: Callable[[], AbstractContextManager[Scorer]],
) -> dict[str, TextScore]:
    batches = {text.name: text_batches(text, settings) for text in sets}
    rows = sum(len(row_bytes) for set_batches in batches.values() for _, row_bytes in set_batches)
    scores = {}
    with open_scorer() as score, console.progress(f"evaluating {name}", rows, "rows") as advance:
        for text in sets:
            scores[text.name] = score(text, batches[text.name], advance)
            keep(text, scores[text.name])
    return scores


def load_model(folder: Path, dtype: str, device: torch.device) -> LanguageModel:
    """A model folder, ready to be scored.

    Raises:
        ModelRefused: it can't be built; says why.
        Corrupted: a base tensor differs from the model's record; names it.
    """
    return build_model(
        folder,
        dtype=getattr(torch, dtype),
        device=device,
        trainable=TrainableSet.of(()),
        record=read_record(folder),
    )


def loss_of(model: LanguageModel, device: torch.device) -> Callable[[Batch], LossOutput]:
    """A model's forward pass, as `evaluate_text` takes it."""

    def loss(batch: Batch) -> LossOutput:
        arrays = (batch.input_ids, batch.labels, batch.position_ids)
        output: LossOutput = model(*(torch.from_numpy(array).to(device) for array in arrays))
        return output

    return loss


def text_batches(text: TextSet, settings: Settings) -> Batches:
    """The rows of a text that are scored, with the UTF-8 bytes of each."""
    rows = max(1, TOKENS_PER_BATCH // settings.sequence_length)
    batches = heldout_batches(text.dataset, settings.sequence_length, settings.sequences, rows, text.split)
    # The last batch is filled up with rows of padding, which one process alone need not compute.
    return [
        chosen_rows(batch, row_bytes, np.flatnonzero((batch.labels != IGNORED).any(axis=1)))
        for batch, row_bytes in batches
        if batch.valid_tokens
    ]


def chosen_rows(batch: Batch, row_bytes: Sequence[float], kept: NDArray[np.intp]) -> tuple[Batch, Sequence[float]]:
    """Some rows of a batch, with the UTF-8 bytes of each."""
    scored = replace(
        batch,
        input_ids=batch.input_ids[kept],
        labels=batch.labels[kept],
        position_ids=batch.position_ids[kept],
        sources=batch.sources[kept],
    )
    return scored, [row_bytes[row] for row in kept.tolist()]


def _keep(store: Path, keys: Mapping[str, MeasurementKey], text: TextSet, score: TextScore) -> None:
    store_measurement(store, keys[text.name], score)


def _present(score: TextScore | None) -> TextScore:
    assert score is not None
    return score


def set_result(text: TextSet, score: TextScore) -> SetResult:
    """A score as results.json has it."""
    return SetResult(
        dataset=text.given,
        dataset_fingerprint=text.dataset.fingerprint,
        split=text.split,
        loss=score.loss,
        loss_half_width=score.loss_half_width,
        bits_per_byte=score.bits_per_byte,
        bits_per_byte_half_width=score.bits_per_byte_half_width,
        tokens=score.tokens,
        bytes=score.bytes,
        rows=len(score.rows),
    )
