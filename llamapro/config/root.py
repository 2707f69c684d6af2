"""The whole run configuration. An object of it is valid: every field, and every rule between fields."""

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llamapro.config.base import Section
from llamapro.config.batch import BatchConfig
from llamapro.config.checkpoint import CheckpointConfig
from llamapro.config.data import DataConfig
from llamapro.config.engine import EngineConfig
from llamapro.config.guards import GuardsConfig
from llamapro.config.logging import LoggingConfig
from llamapro.config.model import ModelConfig
from llamapro.config.objective import ObjectiveConfig
from llamapro.config.optimizer import OptimizerConfig
from llamapro.config.rules import BROKEN_RULES, broken_rules
from llamapro.config.run import RunSection
from llamapro.config.schedule import ScheduleConfig
from llamapro.config.validation import ValidationConfig


class RunConfig(Section):
    """One training run."""

    run: RunSection = Field(default_factory=RunSection)
    """Where the run lives and when it ends."""

    model: ModelConfig
    """Which model, and which of its parameters learn."""

    data: DataConfig
    """Which tokens, in which shares, cut into which sequences."""

    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Held-out text, scored while training."""

    batch: BatchConfig = Field(default_factory=BatchConfig)
    """How many sequences one optimizer step sees."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """How long, and how fast the weights move."""

    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """What is minimized besides the loss of the next token."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW, with weight decay on matrices only."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How the work is spread over devices."""

    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """What a crash can cost, and what a resumed run may change."""

    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    """What stops a run that goes wrong."""

    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """What is written down while training."""

    @model_validator(mode="after")
    def _hold_the_rules(self) -> "RunConfig":
        broken = broken_rules(self)
        if broken:
            text = "; ".join(f"{rule.key}: {rule.text}" for rule in broken)
            raise PydanticCustomError(BROKEN_RULES, "{text}", {"text": text, "broken": broken})
        return self
