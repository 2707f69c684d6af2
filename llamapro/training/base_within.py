"""Where in a model under training its base is: the blocks without which it computes what it was expanded from."""

from collections.abc import Collection
from typing import NamedTuple

from llamapro.config.root import RunConfig
from llamapro.errors import ModelRefused
from llamapro.expansion.lineage import added_blocks
from llamapro.expansion.record import ExpansionRecord
from llamapro.expansion.strength import blocks_above_base
from llamapro.modeling.trainable import TrainableSet
from llamapro.training.findings import Findings
from llamapro.training.model_facts import ModelFacts


class BaseWithin(NamedTuple):
    """The base in a model under training.

    Attributes:
        blocks: without which the model is its base.
        lasting: all through the run; else before its first step only, because weights of the base learn themselves.
    """

    blocks: tuple[int, ...]
    lasting: bool


def base_within(record: ExpansionRecord | None, trainable: TrainableSet) -> BaseWithin:
    """Find the base in a model that is about to be trained.

    Raises:
        ModelRefused: the model was never expanded.
        UserError: weights of the base itself were trained before.
    """
    if record is None:
        raise ModelRefused("the model was never expanded, so it has no new blocks and no base within it")
    at_start = blocks_above_base(record)
    if trainable.everything or not trainable.blocks <= set(added_blocks(record)):
        return BaseWithin(at_start, lasting=False)
    blocks = tuple(sorted({*record.trained.blocks, *trainable.blocks}))
    learned = record.trained.model_copy(update={"blocks": blocks})
    return BaseWithin(blocks_above_base(record.model_copy(update={"trained": learned})), lasting=True)


def check_replay(config: RunConfig, model: ModelFacts, trainable: TrainableSet, findings: Findings) -> None:
    """Check that `objective.replay_kl` has a base to compare with, in every step."""
    if config.objective.replay_kl == 0:
        return
    base = findings.attempt("objective.replay_kl", lambda: base_within(model.record, trainable))
    if base is not None and not base.lasting:
        findings.problem(
            "objective.replay_kl",
            "the base is the model without its new blocks, so its own weights must not learn; set model.trainable to "
            "new, or replay_kl to 0",
        )


def check_retention(
    config: RunConfig,
    model: ModelFacts,
    trainable: TrainableSet,
    unscored_sources: Collection[str],
    findings: Findings,
) -> None:
    """Check that `guards.retention` has a base to compare with, and text to compare on.

    Args:
        unscored_sources: those without held-out text.
    """
    guard = config.guards.retention
    if guard is None:
        return
    base = findings.attempt("guards.retention", lambda: base_within(model.record, trainable))
    if base is not None and not base.lasting and config.checkpoint.start_from is not None:
        findings.problem(
            "guards.retention",
            f"weights of the base itself learn here, and those of {config.checkpoint.start_from} "
            "(checkpoint.start_from) learned before, so there is no base to compare with; set it to null and use "
            "`llamapro evaluate --compare BASE` afterwards",
        )
    if config.validation.sets == "auto" and guard.set in unscored_sources:
        text = f"{guard.set} has no held-out documents; build it with `llamapro data build --heldout`"
        findings.problem("guards.retention.set", text)
