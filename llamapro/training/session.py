"""The parts of a run, made once before the loop by `opening.open_session`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamapro.config.root import RunConfig
from llamapro.data.loader import Batch, SampleStream
from llamapro.engine.engine import Engine
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from llamapro.training.guards import SpikeGuard
from llamapro.training.metrics import MetricsLog
from llamapro.training.preflight import Facts
from llamapro.training.resume import RunIdentity
from llamapro.training.signals import StopRequest


@dataclass(frozen=True)
class Session:
    """What the loop works with; the same on every rank but for `ranks`, `metrics` and what the engine holds.

    Attributes:
        steps: optimizer steps of the whole run.
        source_names: names of the stream's sources, by source number.
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
    identity: RunIdentity
    validation_sets: Mapping[str, Sequence[tuple[Batch, Sequence[float]]]]

    def may_continue(self) -> bool:
        """Whether no rank was asked to stop; collective, and a sign of life to the watchdog."""
        self.stop.heartbeat()
        if self.ranks.any(self.stop.requested):
            self.stop.acknowledge()
            return False
        return True
