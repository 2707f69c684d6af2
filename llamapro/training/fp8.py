"""Runs with `engine.precision: fp8-frozen`: whether they can start, and the proof that nothing in FP8 ever changes."""

import os
from collections.abc import Mapping

import torch
from torch import nn

from llamapro.checkpoint.frozen import FrozenProof
from llamapro.checkpoint.unchanged import Folds, changed_on_any_rank, differing_between_ranks, folds_of
from llamapro.config.root import RunConfig
from llamapro.errors import CheckFailed
from llamapro.expansion.kinds import build_without_weights
from llamapro.modeling.blocks import BlockKind, kind_of
from llamapro.modeling.fp8 import quantized_tensors
from llamapro.modeling.trainable import TrainableSet
from llamapro.planning.fp8_weights import fp8_linears
from llamapro.planning.memory import FP8_FROZEN
from llamapro.ranks import Ranks
from llamapro.training.findings import Findings
from llamapro.training.model_facts import ModelFacts

KEY = "engine.precision"
LEAST_CAPABILITY = (9, 0)
CLAIM = "FP8 codes and scales of frozen weights equal their values at the start, on every rank"


def check_fp8(config: RunConfig, model: ModelFacts | None, trainable: TrainableSet | None, findings: Findings) -> None:
    """Check that there is something to put into FP8, and something that can compute with it."""
    if config.engine.precision != FP8_FROZEN:
        return
    _check_device(compute_capability(), findings)
    if model is None or trainable is None:
        return
    if trainable.everything:
        findings.problem(
            KEY, f"{FP8_FROZEN} is for frozen weights, and here everything learns (model.trainable); use bf16"
        )
    elif not _goes_to_fp8(model, trainable):
        findings.problem(
            KEY,
            f"{FP8_FROZEN} has nothing to do: no frozen block of {model.folder} has a linear layer with sizes "
            "divisible by 16; use bf16",
        )


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU; None where the CPU computes."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return None
    # Where the scheduler shows each rank its own GPU only, that is number 0 for all of them.
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def folds_at_start(model: nn.Module, ranks: Ranks) -> Folds:
    """The folds of everything in FP8, which must be the same on all ranks; collective.

    Raises:
        CheckFailed: a rank holds other values than rank 0; on every rank.
    """
    folds = folds_of(quantized_tensors(model))
    if different := differing_between_ranks(folds, ranks):
        raise CheckFailed(
            f"FP8 weights are not the same on all ranks: {', '.join(different[:5])}; a rank has read other bytes of "
            "the model folder than the others: check that all of them see the same files"
        )
    return folds


def prove_fp8_unchanged(model: nn.Module, start: Mapping[str, int], ranks: Ranks) -> FrozenProof:
    """Compare everything in FP8 with what it was at the start; collective."""
    changed = changed_on_any_rank(start, folds_of(quantized_tensors(model)), ranks)
    return FrozenProof(len(start) - len(changed), len(start), changed, CLAIM)


def _check_device(capability: tuple[int, int] | None, findings: Findings) -> None:
    if capability is None:
        findings.warn(KEY, f"{FP8_FROZEN} is emulated on the CPU: the same roundings, slower than bf16, for tests")
    elif capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        text = f"{FP8_FROZEN} needs a GPU of compute capability {least} (Hopper) or newer, this has {found}; use bf16"
        findings.problem(KEY, text)
    elif not hasattr(torch, "_scaled_mm"):
        findings.problem(KEY, f"{FP8_FROZEN} needs torch._scaled_mm, which torch {torch.__version__} lacks; use bf16")


def _goes_to_fp8(model: ModelFacts, trainable: TrainableSet) -> bool:
    """Whether any weight of this model would be put into FP8."""
    blocks = build_without_weights(model.folder).get_submodule(model.family.decoder_prefix.removesuffix("."))
    frozen = (
        block for index, block in enumerate(blocks.children()) if kind_of(index, trainable) is not BlockKind.TRAINABLE
    )
    return any(fp8_linears(block) for block in frozen)
