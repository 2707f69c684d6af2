"""Facts about the model folder: is it there, can it be trained this way, and exactly what learns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llamapro.config.model import BlockIds, LoraConfig, ModelConfig
from llamapro.config.root import RunConfig
from llamapro.errors import ModelRefused
from llamapro.expansion.families import Family, family_of
from llamapro.expansion.kinds import build_without_weights
from llamapro.expansion.lineage import added_blocks, generations
from llamapro.expansion.record import RECORD_NAME, ExpansionRecord, read_record
from llamapro.expansion.source import read_config, refuse_other_weights
from llamapro.files.tensors import FLOAT_DTYPES, TensorFolder
from llamapro.modeling.lora import adapter_targets, holds_transposed, require_peft
from llamapro.modeling.trainable import Adapters, TrainableSet
from llamapro.modeling.weights import float32_buffers
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.training.findings import Findings

Stage = Literal["pretrain", "sft"]
EXPANSION = "expansion-"
# Weights of these dtypes are represented exactly in the precision's dtype.
EXACT_DTYPES = {"bf16": {"BF16"}, "float32": {"F32", "BF16", "F16"}, "fp8-frozen": {"BF16"}}


@dataclass(frozen=True)
class ModelFacts:
    """A model folder, opened.

    Attributes:
        config: its config.json.
        record: how it was expanded; None if it never was.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    shape: DecoderShape
    record: ExpansionRecord | None


def check_model(config: RunConfig, findings: Findings) -> ModelFacts | None:
    """Open the model folder and check all that depends on it alone."""
    folder = config.model.path
    if not folder.is_dir():
        findings.problem("model.path", f"{folder} is no folder (working directory {Path.cwd()})")
        return None
    model_config = findings.attempt("model.path", lambda: read_config(folder))
    tensors = findings.attempt("model.path", lambda: _open_weights(folder))
    if model_config is None:
        return None
    if tensors is not None:
        findings.attempt("model.path", lambda: _check_dtype(config, tensors, findings))
    _check_positions(config, model_config, findings)
    family = findings.attempt("model.path", lambda: family_of(model_config))
    shape = findings.attempt("model.path", lambda: DecoderShape.from_config(model_config))
    before = len(findings.problems)
    record = findings.attempt("model.path", lambda: read_record(folder))
    if family is None or shape is None or len(findings.problems) > before:
        return None
    return ModelFacts(folder, model_config, family, shape, record)


def resolve_trainable(model: ModelConfig, stage: Stage, facts: ModelFacts) -> TrainableSet:
    """What the setting `model.trainable` stands for.

    Raises:
        ModelRefused: it needs a record that the folder does not have, names blocks that it may not name, or asks for
            adapters beside what can't have any.
        UserError: adapters are asked for, and peft is missing.
    """
    choice = model.trainable
    if choice == "auto":
        choice = "new" if stage == "pretrain" else "all"
    if choice == "all":
        return TrainableSet.all()
    if choice == "lora":
        assert model.lora is not None, "a rule of the configuration"
        return _adapters(model.lora, stage, facts)
    if isinstance(choice, tuple):
        return TrainableSet.of(_named_blocks(choice, stage, facts))
    record = _record_for(choice, facts)
    if choice == "new":
        return TrainableSet.of(added_blocks(record))
    if choice.startswith(EXPANSION):
        return TrainableSet.of(_blocks_of_expansion(choice, facts.folder, record))
    return TrainableSet.of(record.new_blocks)


def learning_of(trainable: TrainableSet) -> Learning:
    """What learns, as the planner sees it."""
    rank = trainable.adapters.rank if trainable.adapters else 0
    return Learning(trainable.blocks, trainable.everything, rank)


def _adapters(lora: LoraConfig, stage: Stage, facts: ModelFacts) -> TrainableSet:
    require_peft()
    blocks = _adapted_blocks(lora.blocks, stage, facts)
    hf = build_without_weights(facts.folder)
    transposed = holds_transposed(adapter_targets(hf, facts.family.decoder_prefix, blocks))
    return TrainableSet.of_adapters(blocks, Adapters(lora.rank, lora.alpha, transposed))


def _adapted_blocks(choice: Literal["all", "new"] | BlockIds, stage: Stage, facts: ModelFacts) -> tuple[int, ...]:
    if isinstance(choice, tuple):
        return _named_blocks(choice, stage, facts)
    return tuple(range(facts.shape.blocks)) if choice == "all" else added_blocks(_record_for(choice, facts))


def _record_for(choice: str, facts: ModelFacts) -> ExpansionRecord:
    """The record, which a choice of blocks can't do without."""
    if facts.record is None:
        raise ModelRefused(
            f"{choice!r} needs the record {RECORD_NAME} that `llamapro expand` writes, and {facts.folder} has none; "
            "expand the model first, or give all or a list of block ids"
        )
    return facts.record


def _open_weights(folder: Path) -> TensorFolder:
    refuse_other_weights(folder)
    return TensorFolder.open(folder)


def _check_dtype(config: RunConfig, tensors: TensorFolder, findings: Findings) -> None:
    """Training in a dtype that can't hold the folder's weights exactly makes new blocks learn on another base."""
    precision = config.engine.precision
    found = {entry.dtype for entry in tensors.entries.values()}
    if strange := sorted(found - set(FLOAT_DTYPES)):
        findings.problem("model.path", f"{tensors.folder} has {', '.join(strange)} weights, which can't be trained")
    elif not config.model.allow_cast and (rounded := _rounded_dtypes(tensors, precision)):
        names = ", ".join(FLOAT_DTYPES[dtype] for dtype in rounded)
        out = "`llamapro expand --dtype bf16`" if precision != "float32" else "`llamapro expand --dtype float32`"
        wider = "" if precision == "float32" else ", or set engine.precision: float32"
        findings.problem(
            "engine.precision",
            f"{precision} would round the {names} weights of {tensors.folder}, so that new blocks learn on another "
            f"base than they serve on; convert the folder with {out}{wider}, or set model.allow_cast: true",
        )


def _rounded_dtypes(tensors: TensorFolder, precision: str) -> list[str]:
    """The dtypes of weights that a precision can't hold, those aside that stay float32 in any."""
    rounded = [entry for entry in tensors.entries.values() if entry.dtype not in EXACT_DTYPES[precision]]
    kept = float32_buffers(build_without_weights(tensors.folder), tensors) if rounded else set()
    return sorted({entry.dtype for entry in rounded if entry.name not in kept})


def _check_positions(config: RunConfig, model_config: Mapping[str, Any], findings: Findings) -> None:
    positions = model_config.get("max_position_embeddings")
    length = config.data.sequence_length
    if isinstance(positions, int) and length > positions:
        field = "rope_parameters" if "rope_parameters" in model_config else "rope_scaling"
        findings.problem(
            "data.sequence_length",
            f"{length} is beyond the {positions} positions of {config.model.path} (max_position_embeddings); use at "
            f"most {positions}, or extend the base before `llamapro expand`: in its config.json set {field}, e.g. to "
            f"rope_type yarn with factor {length / positions:g}, and max_position_embeddings to {length}",
        )


def _named_blocks(blocks: tuple[int, ...], stage: Stage, facts: ModelFacts) -> tuple[int, ...]:
    count = facts.shape.blocks
    if absent := [block for block in blocks if block >= count]:
        raise ModelRefused(f"blocks {_listed(absent)} don't exist; {facts.folder} has blocks 0 to {count - 1}")
    if stage == "pretrain" and facts.record is not None:
        added = added_blocks(facts.record)
        if old := [block for block in blocks if block not in added]:
            raise ModelRefused(
                f"blocks {_listed(old)} are not in the record: they belong to the base, which pretraining must not "
                f"change; new blocks are {_listed(added)}"
            )
    return blocks


def _blocks_of_expansion(choice: str, folder: Path, record: ExpansionRecord) -> tuple[int, ...]:
    """The blocks that `expansion-N` stands for."""
    known = generations(record)
    number = int(choice.removeprefix(EXPANSION))
    if number > len(known):
        has = "; ".join(f"{EXPANSION}{n} added blocks {_listed(blocks)}" for n, blocks in enumerate(known, start=1))
        raise ModelRefused(f"{folder} has no {choice}: {has}")
    return known[number - 1]


def _listed(blocks: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))
