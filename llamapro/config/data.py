"""Section `data`: which tokens, in which shares, cut into which sequences."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from llamapro.config.base import Count, FilePath, Name, Positive, Section


class SourceConfig(Section):
    """One dataset in the mix."""

    path: FilePath
    """Dataset folder written by `llamapro data build`."""

    weight: Positive | None = None
    """Relative share of the tokens; shares need not sum to 1. The source starts over when it is used up."""

    repeat: Positive | None = None
    """Passes over the source in the whole run, e.g. 1.5. All sources have a weight, or all have a repeat."""


class StageConfig(Section):
    """Other shares from some step on."""

    from_step: Count
    """First optimizer step with these weights."""

    weights: Annotated[dict[Name, Positive], Field(min_length=1)]
    """Relative token share by source; a source that is left out rests."""


class DataConfig(Section):
    """Which tokens, in which shares, cut into which sequences."""

    sequence_length: Count = 4096
    """Tokens in a sequence. Changing it never tokenizes again; only a small pack plan is made."""

    packing: Literal["bestfit", "concat", "document"] = "bestfit"
    """How documents fill sequences: bestfit (whole documents, best fit; only longer ones are cut), concat (one after
    another, cut where a sequence ends), document (one a sequence, padded). Attention never crosses documents."""

    sources: Annotated[dict[Name, SourceConfig], Field(min_length=1)]
    """Datasets by name, each with a path and either a weight or a repeat."""

    stages: Annotated[tuple[StageConfig, ...], Strict(False)] = ()
    """Changes of the weights on the way, by rising from_step."""
