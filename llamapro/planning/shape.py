"""The sizes of a decoder model, read from its Hugging Face configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from llamapro.errors import ModelRefused

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class DecoderShape:
    """A decoder with grouped-query attention and a gated MLP.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        blocks: number of blocks.
        heads, key_value_heads, head_dim: of attention.
        vocabulary: rows of the embedding.
        tied: whether embedding and head are one matrix.
        attention_bias, mlp_bias: whether those linears have biases.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a model's config.json.

        Raises:
            ModelRefused: a size is missing.
        """
        if missing := [name for name in _REQUIRED if not isinstance(config.get(name), int)]:
            raise ModelRefused(f"the model's config.json lacks {', '.join(missing)}")
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            blocks=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    def with_blocks(self, blocks: int) -> Self:
        """The same model with another number of blocks."""
        return replace(self, blocks=blocks)

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together; the values' too."""
        return self.key_value_heads * self.head_dim

    @property
    def block_linear_parameters(self) -> int:
        """Weights of a block's seven linears."""
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def block_parameters(self) -> int:
        """All parameters of a block: linears, biases and its two norms."""
        attention_bias = (self.query_width + 2 * self.key_width + self.hidden) * self.attention_bias
        mlp_bias = (2 * self.intermediate + self.hidden) * self.mlp_bias
        return self.block_linear_parameters + attention_bias + mlp_bias + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights of the head (or of the embedding that stands for it)."""
        return self.vocabulary * self.hidden

    @property
    def other_parameters(self) -> int:
        """Parameters outside the blocks: embedding, final norm, and the head where it is not the embedding."""
        return self.head_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.blocks * self.block_parameters + self.other_parameters


@dataclass(frozen=True)
class Learning:
    """What learns, as the planner sees it.

    Attributes:
        blocks: ids of the blocks that learn.
        everything: all parameters learn, those outside the blocks too.
    """

    blocks: frozenset[int]
    everything: bool = False

    def lowest(self) -> int | None:
        """The lowest block that learns; None when nothing does."""
        return 0 if self.everything else min(self.blocks, default=None)

    def trainable_blocks(self, shape: DecoderShape) -> int:
        """How many blocks learn."""
        return shape.blocks if self.everything else len(self.blocks)

    def backward_blocks(self, shape: DecoderShape) -> int:
        """How many blocks the backward pass goes through: those from the lowest that learns upward."""
        lowest = self.lowest()
        return 0 if lowest is None else shape.blocks - lowest

    def parameters(self, shape: DecoderShape) -> int:
        """Trainable parameters."""
        return shape.parameters if self.everything else len(self.blocks) * shape.block_parameters
