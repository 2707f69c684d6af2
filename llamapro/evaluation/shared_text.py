"""The rows of a text shared among ranks, each with a model of its own: part by part in rank order, so in row order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llamapro.data.dataset import Dataset
from llamapro.evaluation.measure import Advance, Batches, Settings, TextSet, load_model, loss_of, text_batches
from llamapro.evaluation.text import RowScore, evaluate_rows
from llamapro.modeling.model import LanguageModel
from llamapro.ranks import Ranks


class RowShare:
    """One rank's part of the work. Batches are cut as one process cuts them, so every row has the same score."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._model: LanguageModel | None = None
        self._device = torch.device("cpu")

    def load(self, folder: str, dtype: str, device_type: str) -> None:
        """Have this model from now on, on the GPU of this rank if the device is one."""
        self.unload()
        on_gpu = device_type == "cuda"
        self._device = torch.device("cuda", self._ranks.local_rank) if on_gpu else torch.device(device_type)
        self._model = load_model(Path(folder), dtype, self._device)

    def unload(self) -> None:
        """Give the model's memory back."""
        self._model = None

    def order(self, text: TextSet, settings: Settings) -> dict[str, Any]:
        """What other ranks need to know to find the same rows; JSON."""
        return {
            "dataset": str(text.dataset.folder.absolute()),
            "split": text.split,
            "sequence_length": settings.sequence_length,
            "sequences": settings.sequences,
        }

    def follow(self, order: Mapping[str, Any]) -> None:
        """On other ranks: score this rank's part of an order."""
        text = TextSet("", order["dataset"], Dataset.open(Path(order["dataset"])), order["split"])
        settings = Settings(order["sequence_length"], order["sequences"], "keep", self._device)
        self.score(text_batches(text, settings), lambda rows: None)

    def score(self, batches: Batches, advance: Advance) -> tuple[RowScore, ...]:
        """Every rank's rows, in row order, after all have scored their part.

        Args:
            batches: of all ranks.
            advance: told the number of rows done: this rank's one by one, the others' at the end.
        """
        assert self._model is not None
        low, high = (
            len(batches) * place // self._ranks.world_size for place in (self._ranks.rank, self._ranks.rank + 1)
        )
        mine = batches[low:high]
        rows = evaluate_rows(loss_of(self._model, self._device), mine, self._ranks, advance)
        advance(sum(len(sizes) for _, sizes in batches) - sum(len(sizes) for _, sizes in mine))
        return rows
