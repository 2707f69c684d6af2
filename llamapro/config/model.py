"""Section `model`: which model, and which of its parameters learn."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from llamapro.config.base import Count, FilePath, Positive, Section

BlockId = Annotated[int, Field(ge=0)]
TrainableChoice = Literal["auto", "new", "last-added", "all", "lora"]
ExpansionName = Annotated[str, Field(pattern=r"^expansion-[1-9][0-9]*$", description="expansion-N")]
BlockIds = Annotated[tuple[BlockId, ...], Strict(False), Field(min_length=1)]


class LoraConfig(Section):
    """Low-rank adapters on chosen blocks."""

    rank: Count
    """Rank of each adapter."""

    alpha: Positive
    """Scale: an adapter's output is multiplied by alpha / rank."""

    blocks: Literal["all", "new"] | BlockIds = "all"
    """Which blocks get adapters: all, new, or a list of block ids."""


class ModelConfig(Section):
    """Which model, and which of its parameters learn."""

    path: FilePath
    """Folder written by `llamapro expand` or `llamapro export`; with trainable: all, lora or a list of block ids any
    model folder."""

    trainable: TrainableChoice | ExpansionName | BlockIds = "auto"
    """What learns: auto (pretraining: new; instruction tuning: all), new (the blocks that any expansion added),
    last-added (those of the latest expansion), expansion-1 (those of the first), expansion-2 (of the second) and so on,
    all, lora, or a list of block ids."""

    lora: LoraConfig | None = None
    """Low-rank adapters; only with trainable: lora."""

    allow_cast: bool = False
    """Train in another dtype than the folder's. Off, because new blocks would learn on one base and serve on another;
    `llamapro expand --dtype` converts the folder instead."""
