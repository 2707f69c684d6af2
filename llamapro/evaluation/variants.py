"""A model scored as it is and in variants of itself: blocks bypassed, or at another strength; each score once.

Scores are kept where those of `measure` are, under the model's digest and what is changed about it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

from llamapro.evaluation.measure import (
    Batches,
    Settings,
    TextSet,
    compute_dtype,
    load_model,
    loss_of,
    measurement_key,
    text_batches,
)
from llamapro.evaluation.model_digest import model_digest
from llamapro.evaluation.results import store_measurement, stored_measurement
from llamapro.evaluation.text import TextScore, evaluate_text
from llamapro.modeling.model import LanguageModel
from llamapro.ranks import Ranks

AS_IT_IS = ""


class Variants:
    """A model folder with a store of its scores; it is loaded when the first score is missing.

    Attributes:
        digest: of the folder's tensors and configuration.
    """

    def __init__(self, folder: Path, settings: Settings, store: Path) -> None:
        """`store`: the folder that scores are kept in."""
        self.digest = model_digest(folder)
        self.settings = settings
        self._folder = folder
        self._store = store
        self._dtype = compute_dtype(folder, settings.precision)
        self._batches: dict[str, Batches] = {}

    @cached_property
    def model(self) -> LanguageModel:
        """The model."""
        return load_model(self._folder, self._dtype, self.settings.device)

    def score(
        self, text: TextSet, variant: str, change: Callable[[LanguageModel], AbstractContextManager[object]]
    ) -> TextScore:
        """The score of a variant on a text.

        Args:
            variant: names the change; `AS_IT_IS` for none.
            change: makes the change while its context lasts.
        """
        digest = f"{self.digest} {variant}" if variant else self.digest
        key = measurement_key(text, digest, self._dtype, self.settings)
        if (stored := stored_measurement(self._store, key)) is not None:
            return stored
        device = self.settings.device
        with change(self.model):
            score = evaluate_text(loss_of(self.model, device), self.batches(text), Ranks.solo(device))
        store_measurement(self._store, key, score)
        return score

    def batches(self, text: TextSet) -> Batches:
        """The rows of a text that are scored."""
        if text.name not in self._batches:
            self._batches[text.name] = text_batches(text, self.settings)
        return self._batches[text.name]
