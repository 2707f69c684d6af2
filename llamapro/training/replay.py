"""Divergence from the base as part of the objective (`objective.replay_kl`): which rows of a batch it is added to.

The base is the model itself without its new blocks: one more forward pass over these rows, and no second model.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from llamapro.config.root import RunConfig
from llamapro.data.arrays import EMPTY, IntArray
from llamapro.data.loader import Batch
from llamapro.data.rows import IGNORED
from llamapro.modeling.replay import Replay
from llamapro.training.base_within import base_within
from llamapro.training.preflight import Facts


@dataclass(frozen=True)
class ReplayObjective:
    """What a run asks for.

    Attributes:
        weight: `objective.replay_kl`; sources: numbers of `objective.sets`.
        base_blocks: the blocks without which the model is its base.
    """

    weight: float
    sources: IntArray
    base_blocks: tuple[int, ...]

    def everywhere(self, batch: Batch) -> Batch:
        """The batch as if all its rows were of a chosen source; itself where none is chosen."""
        return replace(batch, sources=np.full_like(batch.sources, self.sources[0])) if self.sources.size else batch

    def targets(self, batch: Batch) -> int:
        """Targets of a batch at which divergence counts."""
        return batch.only(self._rows(batch)).valid_tokens

    def of(self, batch: Batch, device: torch.device) -> Replay:
        """What to replay of a batch; where nothing counts, a row that counts nothing.

        All ranks pass through the model alike: at ZeRO stage 3 each holds a part of every weight.
        """
        rows = self._rows(batch)
        weight = self.weight if rows.size else 0.0
        rows = rows if rows.size else np.zeros(1, dtype=np.int64)
        numbers, boundaries = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in (rows, batch.only(rows).boundaries)
        )
        return Replay(numbers, boundaries, weight, self.base_blocks)

    def _rows(self, batch: Batch) -> IntArray:
        """Those of the chosen sources that have any target."""
        scored = (batch.labels != IGNORED).any(axis=1)
        return np.flatnonzero(np.isin(batch.sources, self.sources) & scored)


def replay_objective(config: RunConfig, facts: Facts) -> ReplayObjective:
    """What the configuration asks for; without `objective.replay_kl`, nothing of any source."""
    objective = config.objective
    if objective.replay_kl == 0:
        return ReplayObjective(0.0, EMPTY, ())
    sources = [number for number, name in enumerate(facts.sources) if name in objective.sets]
    base = base_within(facts.record, facts.trainable)
    return ReplayObjective(objective.replay_kl, np.array(sources, dtype=np.int64), base.blocks)
