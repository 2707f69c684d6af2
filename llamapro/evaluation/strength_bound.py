"""The largest strength of the new blocks at which general text gets no worse than a bound allows.

One half of each probe's rows decides, by the upper end of the increase's 95 % interval: were it the increase itself,
text that had no part in the choice would be beyond the bound every other time. The other half says what to expect of
such text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamapro import console
from llamapro.data.loader import Batch
from llamapro.errors import CheckFailed, DataError
from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.measure import (
    Batches,
    Settings,
    TextSet,
    chosen_rows,
    compute_dtype,
    load_model,
    loss_of,
    text_batches,
)
from llamapro.evaluation.strength import StrengthDial, largest_within
from llamapro.evaluation.text import TextScore, evaluate_text, relative_change
from llamapro.expansion.record import ExpansionRecord
from llamapro.modeling.model import LanguageModel
from llamapro.ranks import Ranks

LEAST_ROWS = 4
"""Of a probe: two to decide and two to check; one row has no interval."""


@dataclass(frozen=True)
class BoundedStrength:
    """What a search found.

    Attributes:
        bound: on the increase of the loss, as a fraction of the base's.
        measured: the increase at `strength` by probe, on the rows that decided; `unseen` on those that did not.
        tried: how many strengths were measured.
    """

    strength: float
    bound: float
    measured: Mapping[str, Estimate]
    unseen: Mapping[str, Estimate]
    tried: int


class _Probes:
    """A model in memory with halves of probes: their losses at strengths against those at strength 0."""

    def __init__(
        self, model: LanguageModel, dial: StrengthDial, halves: Mapping[str, Batches], settings: Settings
    ) -> None:
        self._model, self._dial, self._halves, self._settings = model, dial, halves, settings
        self._base = {name: self._score(name, 0.0) for name in halves}
        self.tried = 0

    def increases(self, strength: float) -> dict[str, Estimate]:
        """By probe."""
        self.tried += 1
        return {name: relative_change(self._score(name, strength), base) for name, base in self._base.items()}

    def largest_increase(self, strength: float) -> float:
        """Over all probes, each at the upper end of its interval."""
        ends = []
        for increase in self.increases(strength).values():
            assert increase.half_width is not None, f"a probe has at least {LEAST_ROWS} rows"
            ends.append(increase.value + increase.half_width)
        return max(ends)

    def _score(self, name: str, strength: float) -> TextScore:
        device = self._settings.device
        with self._dial.at(strength):
            return evaluate_text(loss_of(self._model, device), self._halves[name], Ranks.solo(device))


def find_strength(
    folder: Path, record: ExpansionRecord, probes: Sequence[TextSet], settings: Settings, bound: float
) -> BoundedStrength:
    """The largest strength at which no probe's loss is above that at strength 0 by more than the bound, at 95 %.

    Args:
        folder: of a trained model; `record`: beside it.
        bound: as a fraction of the loss at strength 0.

    Raises:
        UserError: no strength leads to a base.
        DataError: a probe has less than LEAST_ROWS rows.
        CheckFailed: no strength above 0 keeps the bound.
    """
    model = load_model(folder, compute_dtype(folder, settings.precision), settings.device)
    dial = StrengthDial(model, record)
    halves = {text.name: _halves(text, settings) for text in probes}
    deciding = _Probes(model, dial, {name: pair[0] for name, pair in halves.items()}, settings)
    console.info(f"looking for the largest strength with at most {bound:+.2%} on {', '.join(halves)}")
    strength = largest_within(deciding.largest_increase, bound)
    if strength == 0:
        raise CheckFailed(
            f"no strength above 0 keeps the increase on {', '.join(halves)} within {bound:.2%}; allow more "
            "(--max-general-increase), or train with replay of general text"
        )
    unseen = _Probes(model, dial, {name: pair[1] for name, pair in halves.items()}, settings)
    return BoundedStrength(
        strength, bound, deciding.increases(strength), unseen.increases(strength), tried=deciding.tried - 1
    )


def _halves(text: TextSet, settings: Settings) -> tuple[Batches, Batches]:
    """Every other row of a text, and the rows in between."""
    deciding: list[tuple[Batch, Sequence[float]]] = []
    unseen: list[tuple[Batch, Sequence[float]]] = []
    seen = 0
    for batch, row_bytes in text_batches(text, settings):
        rows = np.arange(len(row_bytes))
        for parity, half in enumerate((deciding, unseen)):
            kept = rows[(rows + seen) % 2 == parity]
            if len(kept):
                half.append(chosen_rows(batch, row_bytes, kept))
        seen += len(rows)
    if seen < LEAST_ROWS:
        raise DataError(
            f"{text.given}: its {text.split} text fills {seen} row{'s' if seen != 1 else ''} of "
            f"{settings.sequence_length} tokens, and {LEAST_ROWS} are needed, half to decide and half to check; "
            "give a longer text"
        )
    return deciding, unseen
