"""How far a run is, and what one optimizer step did: plain values that the loop hands from step to step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamapro.data.loader import Batch


@dataclass(frozen=True)
class Progress:
    """What is behind the run: everything the loop needs to continue, besides weights and optimizer state.

    Attributes:
        step: optimizer steps taken or skipped.
        sequences: sequences of the sample stream used up; the next one is this number.
        tokens: target tokens trained on, over all ranks; source_tokens: the same by source.
        skipped: steps whose update was skipped by a guard.
        validated: the last step after which held-out text was scored; -1 before the first time.
        start_difference: largest difference of logits between model and base before the first step; None where it was
            not measured.
        base_losses: nats per token of the base on held-out text, by what fixes them.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: int = 0
    validated: int = -1
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    start_difference: float | None = None
    base_losses: Mapping[str, float] = field(default_factory=dict)

    def after(self, outcome: "StepOutcome", sequences: int) -> "Progress":
        """The progress after one more step over this many sequences."""
        names = {**self.source_tokens, **outcome.source_tokens}
        return replace(
            self,
            step=self.step + 1,
            sequences=self.sequences + sequences,
            tokens=self.tokens + outcome.tokens,
            skipped=self.skipped + int(bool(outcome.skipped)),
            source_tokens={
                name: self.source_tokens.get(name, 0) + outcome.source_tokens.get(name, 0) for name in names
            },
        )


@dataclass(frozen=True)
class StepWork:
    """One rank's share of one optimizer step: equally many micro-batches of equal shape on every rank."""

    micro_batches: tuple[Batch, ...]

    @property
    def valid_tokens(self) -> int:
        """Target tokens in this rank's share."""
        return sum(batch.valid_tokens for batch in self.micro_batches)


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: mean over all target tokens of the step, nats per token.
        source_losses: the same per source, for the sources that occurred; source_tokens: their target tokens.
        gradient_norm: of the mean-loss gradient over all trainable parameters, before clipping.
        skipped: why the update was not applied; empty when it was.
        tokens: target tokens of the step, over all ranks.
        replay_kl: mean KL(base ‖ model) over the targets of `objective.sets`, nats per token; None where there were
            none.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    skipped: str = ""
    source_losses: Mapping[str, float] = field(default_factory=dict)
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    replay_kl: float | None = None
