"""results.json, what `llamapro evaluate` writes, and the measurements beside it that make a second run instant.

Every measurement is a file of its own named by what was measured (model bytes, dataset, cut, precision), written as
soon as it is known: an interrupted evaluation continues, a repeated one only reads.
"""

from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from llamapro.errors import Corrupted
from llamapro.evaluation.stored import Key, Stored, write_stored
from llamapro.evaluation.text import RowScore, TextScore, score_rows
from llamapro.evaluation.verdict import Verdict
from llamapro.files.atomic import write_atomic

RESULTS_NAME = "results.json"
MEASUREMENTS = "measurements"
FORMAT_VERSION = 1
INTERVALS = "95 %, Student's t over packed rows; changes are paired row by row"


class MeasurementKey(Key):
    """What fixes a measurement.

    Attributes:
        model_digest: of the model's tensors and configuration.
        dataset_fingerprint: with `split`, the text.
        sequence_length: tokens of a row; `sequences`: rows at most.
        precision: the dtype computed in, "float32" or "bfloat16".
        device: "cpu" or "cuda".
    """

    model_digest: str
    dataset_fingerprint: str
    split: str
    sequence_length: int
    sequences: int
    precision: str
    device: str
    program: str


class SetResult(Stored):
    """A model's score on one text set: nats per token and bits per UTF-8 byte, each with its 95 % half width."""

    dataset: str
    dataset_fingerprint: str
    split: str
    loss: float
    loss_half_width: float | None
    bits_per_byte: float
    bits_per_byte_half_width: float | None
    tokens: int
    bytes: float
    rows: int


class ModelResult(Stored):
    """One model's scores by set name; `name` is as the user gave it, `digest` that of tensors and configuration."""

    name: str
    digest: str
    sets: dict[str, SetResult]


class Change(Stored):
    """How the model's loss on a set differs from the base's, as a fraction of it, with its 95 % half width."""

    fraction: float
    half_width: float | None


class Contribution(Stored):
    """By how many nats per token the loss rises without a block, with its 95 % half width."""

    increase: float
    half_width: float | None


class TokenShift(Stored):
    """At how many target positions the model's most likely token is the base's too, at rank 2 or 3, or beyond."""

    positions: int
    unshifted: int
    marginal: int
    shifted: int


class Results(Stored):
    """The whole of results.json.

    Attributes:
        settings: sequence_length (tokens), sequences (rows per set, at most), precision, device.
        versions: of the programs that measured.
        changes: by set name, of the model against the base; empty without a base.
        verdicts: by set name, what the changes show at 95 %.
        detail_sequences: rows per set, at most, that the rest was measured on.
        contributions: of each added block, by set name.
        shifts: by set name, of the model against the base.
    """

    format_version: int = FORMAT_VERSION
    intervals: str = INTERVALS
    settings: dict[str, Any]
    versions: dict[str, str]
    model: ModelResult
    base: ModelResult | None = None
    changes: dict[str, Change] = {}
    verdicts: dict[str, Verdict] = {}
    detail_sequences: int = 0
    contributions: dict[str, dict[str, Contribution]] = {}
    shifts: dict[str, TokenShift] = {}


def write_results(folder: Path, results: Results) -> Path:
    """Write results.json; returns its path."""
    path = folder / RESULTS_NAME
    write_stored(path, results)
    return path


def read_results(folder: Path) -> Results | None:
    """The results in a folder, or None where there are none.

    Raises:
        Corrupted: the file can't be read.
    """
    path = folder / RESULTS_NAME
    try:
        return Results.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise Corrupted(f"{path} can't be read; delete it and evaluate again ({error})") from error


def store_measurement(folder: Path, key: MeasurementKey, score: TextScore) -> None:
    """Keep a score under its key."""
    (folder / MEASUREMENTS).mkdir(parents=True, exist_ok=True)
    rows = [[row.loss_sum, row.tokens, row.utf8_bytes] for row in score.rows]
    content = orjson.dumps({"key": key.model_dump(), "rows": rows})
    write_atomic(_measurement(folder, key), content)


def stored_measurement(folder: Path, key: MeasurementKey) -> TextScore | None:
    """The score kept under a key; None where there is none, or none that can be read."""
    try:
        content = orjson.loads(_measurement(folder, key).read_bytes())
    except (OSError, ValueError):
        return None
    if content.get("key") != key.model_dump():
        return None
    return score_rows([RowScore(*row) for row in content["rows"]])


def _measurement(folder: Path, key: MeasurementKey) -> Path:
    return folder / MEASUREMENTS / f"{key.digest()}.json"
