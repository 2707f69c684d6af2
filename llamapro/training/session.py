"""The parts of a run, made once before the loop by `opening.open_session`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamapro.config.root import RunConfig
from llamapro.data.loader import Batch, SampleStream
from llamapro.engine.engine import Engine
from llamapro.expansion.record import ExpansionRecord
from llamapro.files.lock import RunLock
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from llamapro.training.guards import SpikeGuard
from llamapro.training.metrics import MetricsLog
from llamapro.training.preflight import Facts
from llamapro.training.resume import RunIdentity
from llamapro.training.signals import StopRequest


class StopAsked(Exception):
    """All ranks agreed to stop; the text says who asked. The loop saves and ends with a `RetryLater`."""


@dataclass(frozen=True)
class Session:
    """What the loop works with; the same on every rank but for `ranks`, `metrics` and what the engine holds.

    Attributes:
        steps: optimizer steps of the whole run.
        source_names: names of the stream's sources, by source number.
        deadline: `time.monotonic()` at which the run stops by itself; None: never.
        lock: of the run folder, held by rank 0; None on the others.
        live_record: the expansion record as the weights in memory must match it; of a model without one, what its
            folder holds; None where all of that learns.
        fp8_start: folds of what is in FP8 as it was at the start; empty where nothing is.
        validation_sets: this rank's held-out batches by set, with the UTF-8 bytes of each row; equally many batches
            on every rank.
    """

    config: RunConfig
    facts: Facts
    folder: RunFolder
    ranks: Ranks
    engine: Engine
    stream: SampleStream
    steps: int
    source_names: Sequence[str]
    guard: SpikeGuard
    metrics: MetricsLog
    stop: StopRequest
    deadline: float | None
    lock: RunLock | None
    identity: RunIdentity
    live_record: ExpansionRecord | None
    fp8_start: Mapping[str, int]
    validation_sets: Mapping[str, Sequence[tuple[Batch, Sequence[float]]]]

    def go_on(self) -> None:
        """Go on unless any rank was asked to stop; collective, and a sign of life to the watchdog.

        Raises:
            StopAsked: on every rank, with one rank's reason.
        """
        self.stop.heartbeat()
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.stop.request("run.stop_after_minutes are over")
        if self.ranks.any(self.stop.requested):
            self.stop.acknowledge()
            raise StopAsked(next(filter(None, self.ranks.all_gather_json(self.stop.reason))))
