"""How important each block of a model is: the loss increase on a probe text when the block is bypassed.

Plain transformers runs the model, one pass over the text for each block and one for the whole, so that every family
that transformers loads can be scored. Only the scores decide: the first and the last block are blocks like any other.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from llamapro import console
from llamapro.data.batches import Batch
from llamapro.data.rows import IGNORED
from llamapro.errors import CheckFailed, DataError, ModelRefused
from llamapro.evaluation.bypass import BlockScores, score_blocks
from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.measure import program_versions
from llamapro.evaluation.probe import ProbeRows, ProbeText, cut_rows
from llamapro.evaluation.student import standard_errors_975
from llamapro.expansion.families import Family, count_of_blocks, family_of
from llamapro.expansion.importance import BlockImportance, ImportanceReport, least_important, require_enough_blocks
from llamapro.expansion.source import read_config
from llamapro.ranks import Ranks

ROW_LENGTH = 512
# Names of the number of positions in the configurations of transformers.
POSITION_FIELDS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")


class _Losses(NamedTuple):
    row_loss_sums: torch.Tensor
    row_tokens: torch.Tensor


def measure_importance(
    folder: Path, weights: Path, probe: ProbeText, *, new_blocks: int, tokens: int, device: torch.device
) -> ImportanceReport:
    """Score every block of a model and choose the `new_blocks` least important.

    float32 on the CPU, bf16 on a GPU; the memory of one model.

    Args:
        folder: of its config.json; `weights`: of its safetensors.
        tokens: of the probe that are used, at most.

    Raises:
        UserError: the model has fewer blocks.
        DataError: the probe is too short, or holds ids that the model has no embedding of.
        ModelRefused: transformers can't load the folder, or lacks some of its tensors.
        CheckFailed: a loss is not finite.
    """
    config = read_config(folder)
    family = family_of(config)
    require_enough_blocks(count_of_blocks(family, config), new_blocks)
    model = _load(folder, weights, device)
    blocks = _blocks_of(model, family)
    rows = cut_rows(probe, tokens, _row_length(model.config))
    _require_known_ids(rows, model, probe)
    if rows.input_ids.size + rows.input_ids.shape[1] <= tokens:
        console.warning(f"{probe.name} has text for {rows.input_ids.size:,} of the {tokens:,} probe tokens asked for")
    with console.progress(f"scoring {len(blocks)} blocks", len(rows.input_ids) * (len(blocks) + 1), "rows") as advance:
        scores = score_blocks(
            _loss_of(model, device),
            lambda chosen: bypassed(blocks, chosen),
            range(len(blocks)),
            rows.batches(),
            Ranks.solo(device),
            advance,
        )
    _require_finite(scores)
    return _report(scores, new_blocks, rows, probe, model)


@contextmanager
def bypassed(blocks: nn.ModuleList, indices: Iterable[int]) -> Iterator[None]:
    """While it lasts, these blocks of a plain transformers model pass their residual stream straight on.

    They still run, so whatever else a block returns or leaves behind is as always.
    """
    handles = [blocks[index].register_forward_hook(_pass_on, with_kwargs=True) for index in indices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _load(folder: Path, weights: Path, device: torch.device) -> PreTrainedModel:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights,
            config=config,
            # Nothing is generated; a converted base has no such file beside its weights.
            generation_config=GenerationConfig(),  # type: ignore[no-untyped-call]
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError) as error:
        raise ModelRefused(f"{folder} can't be loaded by transformers: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelRefused(f"{folder} has no tensor for {missing[0]}, so transformers would make it up")
    assert isinstance(model, PreTrainedModel)
    model.to(device)  # type: ignore[arg-type]
    return model.eval()  # type: ignore[no-untyped-call,no-any-return]


def _blocks_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    blocks = model.get_submodule(family.decoder_prefix.removesuffix("."))
    assert isinstance(blocks, nn.ModuleList), family.name
    return blocks


def _row_length(config: PretrainedConfig) -> int:
    positions = (getattr(config, name, None) for name in POSITION_FIELDS)
    return min([ROW_LENGTH, *(count for count in positions if isinstance(count, int))])


def _require_known_ids(rows: ProbeRows, model: PreTrainedModel, probe: ProbeText) -> None:
    known = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if (highest := int(rows.input_ids.max())) >= known:
        raise DataError(f"{probe.name} has ids up to {highest}, but the model has {known} embeddings")


def _loss_of(model: PreTrainedModel, device: torch.device) -> Callable[[Batch], _Losses]:
    def loss(batch: Batch) -> _Losses:
        ids, labels = (torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.labels))
        logits = model(input_ids=ids, use_cache=False).logits
        sums = [
            F.cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="none").double().sum()
            for row, targets in zip(logits, labels, strict=True)
        ]
        return _Losses(torch.stack(sums), (labels != IGNORED).sum(1))

    return loss


def _require_finite(scores: BlockScores) -> None:
    if not math.isfinite(scores.whole.loss):
        raise CheckFailed(f"the base's loss on the probe is {scores.whole.loss}: its weights are damaged")
    if bad := [block for block, score in scores.without.items() if not math.isfinite(score.loss)]:
        raise CheckFailed(
            f"without block {bad[0]} the loss on the probe is not finite, so blocks can't be compared; name the blocks "
            "to copy yourself, e.g. --placement 3,7,11"
        )


def _report(
    scores: BlockScores, new_blocks: int, rows: ProbeRows, probe: ProbeText, model: PreTrainedModel
) -> ImportanceReport:
    increases = {block: scores.loss_increase(block) for block in scores.without}
    chosen = least_important({block: increase.value for block, increase in increases.items()}, new_blocks)
    differences = {block: scores.difference(block, chosen[-1]) for block in increases if block not in chosen}
    return ImportanceReport(
        probe=probe.name,
        probe_sha256=rows.sha256,
        tokens=scores.whole.tokens,
        row_length=int(rows.input_ids.shape[1]),
        passes=1 + len(increases),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        versions=program_versions(),
        loss=scores.whole.loss,
        blocks=tuple(
            BlockImportance(
                block=block,
                loss_increase=increase.value,
                standard_error=_half_width(increase) / standard_errors_975(len(scores.whole.rows)),
                copied=block in chosen,
            )
            for block, increase in increases.items()
        ),
        undecided=tuple(block for block, more in differences.items() if more.value <= _half_width(more)),
    )


def _half_width(estimate: Estimate) -> float:
    assert estimate.half_width is not None, "a probe has at least two rows"
    return estimate.half_width
