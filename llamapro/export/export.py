"""Export: a run, a checkpoint or a delta becomes a plain Hugging Face folder, or a delta against its base.

Streamed: memory stays constant. The output appears whole or not at all. No training code is imported.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llamapro import console
from llamapro.errors import UserError
from llamapro.expansion.config import copy_companions
from llamapro.expansion.record import CONFIG_NAME, ExpansionRecord, write_record
from llamapro.expansion.source import CARD_NAME, companion_files, read_config, resolve_model
from llamapro.expansion.strength import Strengths, described
from llamapro.export.adapters import record_after, trained_tensors
from llamapro.export.card import CardFacts, model_card
from llamapro.export.carry import carried_config, carried_record
from llamapro.export.delta import FILES, TENSORS, open_delta, rebuilt_tensors, write_index
from llamapro.export.history import read_history
from llamapro.export.source import TrainedSource, find_trained, is_delta
from llamapro.export.strength import StrengthRequest, at_strengths, scaled_names
from llamapro.export.tensors import OUTPUT_DTYPES, ExportTensor, merged_tensors, planned_bytes, write_tensors
from llamapro.export.terms import Terms, terms_of
from llamapro.files.atomic import require_free_target, staged_folder
from llamapro.files.disk import require_free_space
from llamapro.files.tensors import TensorFolder

# Headers, config, record, tokenizer, card: more than they ever take.
SMALL_FILES_BYTES = 64 << 20
AS_TRAINED = StrengthRequest()


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        tensors: in the whole model; `own` of them differ from the base.
        unchanged: base tensors proved bit-identical to the record while they were copied.
        bytes: of the tensors written.
        step: optimizer steps behind the weights; None when they came from a delta.
        strengths: of the blocks that are not written as training left them.
    """

    folder: Path
    tensors: int
    own: int
    unchanged: int
    bytes: int
    step: int | None
    strengths: Strengths = field(default_factory=dict)


def export(
    source: Path,
    out: Path,
    *,
    model: Path | None = None,
    base: str | None = None,
    dtype: str = "keep",
    delta: bool = False,
    overwrite: bool = False,
    strength: StrengthRequest = AS_TRAINED,
) -> ExportSummary:
    """Write `out` from a run folder, a checkpoint or a delta.

    Args:
        model: the model folder that was trained, where the run's configuration does not lead to it.
        base: for a delta: folder or hub id of the original base, or the expanded model.
        dtype: "keep" (the model folder's), "bf16" or "float32", for all float tensors; masters are rounded to nearest
            even, and stay as they are in float32.
        delta: write only what differs from the base.
        strength: of the new blocks.

    Raises:
        UserError: arguments that don't fit, no disk space, or an `out` that exists.
        CheckFailed: checkpoint and model folder don't belong together.
        Corrupted: a file is damaged, or a base tensor differs from the record; names it.
    """
    require_free_target(out, overwrite=overwrite)
    if is_delta(source):
        _refuse(dtype != "keep", f"--dtype {dtype}: a delta has the dtype that it was exported with")
        _refuse(delta, f"{source} is a delta already; leave --delta out")
        _refuse(model is not None, "--model: a delta is rebuilt from its base; pass --base")
        _refuse(strength != AS_TRAINED, "--strength: a delta has the strength that it was exported with")
        if base is None:
            made_from = open_delta(source).index.base_id
            raise UserError(f"{source} is a delta: pass what it was made from, {made_from}, as --base")
        return _rebuild(source, out, resolve_model(base), overwrite)
    _refuse(base is not None, f"--base is for deltas; {source} is none: its model folder is --model")
    trained = find_trained(source, model)
    _refuse(out.resolve() == trained.model.resolve(), f"{out} is the model folder itself; choose another folder")
    if delta and trained.record is None:
        raise UserError(f"{trained.model} was never expanded, so there is no base for --delta; export it whole")
    return _merge(trained, out, dtype, delta, overwrite, strength)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise UserError(message)


def _merge(
    trained: TrainedSource, out: Path, dtype: str, delta: bool, overwrite: bool, request: StrengthRequest
) -> ExportSummary:
    model = TensorFolder.open(trained.model)
    masters = trained_tensors(trained, model)
    record = record_after(trained.record, masters)
    strengths = request.resolved(record)
    merged = merged_tensors(model, trained.record, masters, dtype)
    tensors = at_strengths(merged, record, strengths)
    nbytes = planned_bytes(tensors, only_own=delta)
    require_free_space(out, nbytes + SMALL_FILES_BYTES, "the export")
    with staged_folder(out, overwrite=overwrite) as staging:
        for name in (TENSORS, FILES) if delta else ():
            (staging / name).mkdir()
        weights, files = (staging / TENSORS, staging / FILES) if delta else (staging, staging)
        with _bar(planned_bytes(tensors)) as advance:
            written = write_tensors(weights, tensors, advance, only_own=delta)
        if record is not None:
            record = carried_record(record, scaled_names(tensors, record, strengths), written, strengths)
        _write_files(files, trained, record, tensors, OUTPUT_DTYPES[dtype], _strength_text(strengths, request.reason))
        if delta:
            assert trained.record is not None
            write_index(staging, tensors, written, trained.record)
    return replace(_summary(out, tensors, nbytes, trained.checkpoint.step), strengths=strengths)


def _strength_text(strengths: Strengths, reason: str) -> str:
    return f"{described(strengths)}{f': {reason}' if reason else ''}" if strengths else ""


def _write_files(
    folder: Path,
    trained: TrainedSource,
    record: ExpansionRecord | None,
    tensors: Sequence[ExportTensor],
    dtype: str | None,
    strength: str,
) -> None:
    """Everything of the export that is no tensor: companions, record, config.json, card."""
    copy_companions(trained.model, folder)
    if record is not None:
        write_record(folder, record)
    config = read_config(trained.model)
    (folder / CONFIG_NAME).write_text(carried_config(config, record, dtype), encoding="utf-8")
    facts = _card_facts(trained, record, config, tensors, terms_of(trained.model, companion_files(trained.model)))
    card = model_card(replace(facts, strength=strength))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _card_facts(
    trained: TrainedSource,
    record: ExpansionRecord | None,
    config: dict[str, Any],
    tensors: Sequence[ExportTensor],
    terms: Terms,
) -> CardFacts:
    step = trained.checkpoint.step
    return CardFacts(
        architecture=next(iter(config.get("architectures") or ["AutoModelForCausalLM"])),
        record=record,
        history=read_history(trained.run, step) if trained.run else None,
        step=step,
        unchanged=sum(not tensor.own for tensor in tensors),
        terms=terms,
    )


def _rebuild(source: Path, out: Path, base: Path, overwrite: bool) -> ExportSummary:
    delta = open_delta(source)
    tensors = rebuilt_tensors(delta, base)
    nbytes = planned_bytes(tensors)
    require_free_space(out, nbytes + SMALL_FILES_BYTES, "the export")
    with staged_folder(out, overwrite=overwrite) as staging:
        with _bar(nbytes) as advance:
            write_tensors(staging, tensors, advance, max_shard_bytes=delta.index.max_shard_bytes)
        delta.copy_files(staging)
    return _summary(out, tensors, nbytes, None)


def _summary(out: Path, tensors: Sequence[ExportTensor], nbytes: int, step: int | None) -> ExportSummary:
    own = sum(tensor.own for tensor in tensors)
    return ExportSummary(out, len(tensors), own, len(tensors) - own, nbytes, step)


def _bar(nbytes: int) -> AbstractContextManager[Any]:
    return console.progress("exporting", nbytes, "bytes")
