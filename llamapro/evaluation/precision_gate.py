"""Whether a faster precision taught what bf16 teaches: held-out loss of both results, evaluated in bf16 both.

New blocks trained on a base in FP8 serve on the base in bf16, so it is there that they are judged. The two models see
the same rows, and the interval is that of their paired difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llamapro.evaluation.measure import Settings, TextSet, measure
from llamapro.evaluation.text import TextScore, relative_change

# Of the loss: what FP8 training of large models is reported to stay under (DeepSeek-V3, arXiv 2412.19437, section 3.3).
DEFAULT_BOUND = 0.0025


@dataclass(frozen=True)
class Contestants:
    """Model folders: before training, and after it in bf16 and in the precision that is to be judged."""

    untrained: Path
    bf16: Path
    judged: Path


@dataclass(frozen=True)
class Verdict:
    """One text.

    Attributes:
        untrained, bf16, judged: losses in nats per target token.
        fraction: by how much of the bf16 run's loss the judged one's is higher; less than 0 where it is lower.
        half_width: of its 95 % confidence interval; None: one row says nothing.
        bound: the whole interval must lie below it.
    """

    text: str
    untrained: float
    bf16: float
    judged: float
    fraction: float
    half_width: float | None
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the loss is shown to be higher by less than the bound."""
        return self.half_width is not None and self.fraction + self.half_width < self.bound

    @property
    def kept_gain(self) -> float | None:
        """The share of what training in bf16 gained that the judged run gained too; None where it gained nothing."""
        gained = self.untrained - self.bf16
        return (self.untrained - self.judged) / gained if gained > 0 else None

    def __str__(self) -> str:
        width = "one row, so no interval" if self.half_width is None else f"± {self.half_width:.3%}"
        kept = "" if self.kept_gain is None else f"; {self.kept_gain:.1%} of the gain over {self.untrained:.4f}"
        judgement = "passed" if self.passed else "not passed"
        return (
            f"{self.text}: loss {self.judged:.4f} against {self.bf16:.4f} trained in bf16, {self.fraction:+.3%} {width}"
            f"{kept}; bound {self.bound:.2%}: {judgement}"
        )


def judge(
    contestants: Contestants, sets: Sequence[TextSet], settings: Settings, store: Path, bound: float = DEFAULT_BOUND
) -> tuple[Verdict, ...]:
    """Measure the three models in bf16 and judge each text; measurements are kept in the folder `store`."""
    in_bf16 = replace(settings, precision="bf16")

    def scores(folder: Path, name: str) -> Mapping[str, TextScore]:
        return measure(folder, name, sets, in_bf16, store).scores

    untrained = scores(contestants.untrained, "the model before training")
    bf16, judged = scores(contestants.bf16, "trained in bf16"), scores(contestants.judged, "trained as judged")
    return tuple(verdict(name, untrained[name], bf16[name], judged[name], bound) for name in bf16)


def verdict(text: str, untrained: TextScore, bf16: TextScore, judged: TextScore, bound: float) -> Verdict:
    """Judge one text by scores of the same rows."""
    change = relative_change(judged, bf16)
    return Verdict(text, untrained.loss, bf16.loss, judged.loss, change.value, change.half_width, bound)
