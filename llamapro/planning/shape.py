"""The sizes of a decoder model, block by block, and what of it learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from llamapro.planning.kept import KeptByKind


@dataclass(frozen=True)
class BlockSize:
    """One block.

    Attributes:
        parameters: all of them.
        matrices: weights that one token is multiplied with: linears and routers, and of experts those chosen.
        last_matrix: those of the last linear where nothing keeps its result: a block that is computed again is left
            before it.
        window: tokens that a position attends to at most, itself included; None: all before it.
        experts: tokens go to different weights.
        fp8_saving: bytes that it takes less when it is frozen and in FP8, against bf16.
        linears: how many there are; `linear_widths`: the sum of their inputs and outputs.
        adapters: of its parameters and matrices, those of adapters; `adapter_rank`: of theirs.
        kept: what its backward pass needs, by width and kind; empty where that couldn't be seen.
    """

    parameters: int
    matrices: int
    window: int | None = None
    last_matrix: int = 0
    experts: bool = False
    fp8_saving: int = 0
    linears: int = 0
    linear_widths: int = 0
    adapters: int = 0
    adapter_rank: int = 0
    kept: "KeptByKind" = field(default_factory=dict, compare=False)

    def with_adapters(self, rank: int) -> Self:
        """The block with an adapter beside each of its linears."""
        added = rank * self.linear_widths
        parameters, matrices = self.parameters + added, self.matrices + added
        return replace(self, parameters=parameters, matrices=matrices, adapters=added, adapter_rank=rank)


@dataclass(frozen=True)
class DecoderShape:
    """A decoder of any family.

    Attributes:
        hidden: width of the residual stream.
        heads, key_value_heads: of attention.
        key_dim, value_dim: width of one head's queries and keys, and of its values.
        vocabulary: rows of the embedding.
        block_sizes: of the blocks, from the lowest to the highest.
        other_parameters: outside the blocks: embeddings, final norm, and the head where it is not the embedding.
        scores_kept: no fused kernel computes this model's attention, so the backward pass needs every score.
    """

    hidden: int
    heads: int
    key_value_heads: int
    key_dim: int
    value_dim: int
    vocabulary: int
    block_sizes: tuple[BlockSize, ...]
    other_parameters: int
    scores_kept: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DecoderShape":
        """Read a model's config.json: transformers builds the model without weights, and its parameters are counted.

        Raises:
            ModelRefused: transformers can't build it, or no family says where its blocks are.
        """
        from llamapro.planning.measure import measure

        return measure(config)

    def with_blocks_of(self, sources: Sequence[int]) -> Self:
        """The model whose blocks are these of this one, with repeats: what an expansion's layout says."""
        return replace(self, block_sizes=tuple(self.block_sizes[source] for source in sources))

    def with_adapters(self, learning: "Learning") -> Self:
        """The model with the adapters that learn, if any do."""
        rank = learning.adapter_rank
        if not rank:
            return self
        sizes = enumerate(self.block_sizes)
        adapted = tuple(size.with_adapters(rank) if learning.includes(block) else size for block, size in sizes)
        return replace(self, block_sizes=adapted)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_sizes)

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.key_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together."""
        return self.key_value_heads * self.key_dim

    @property
    def intermediate(self) -> float:
        """Width of a gated MLP with as many weights as a block's MLP (its chosen experts) has on average."""
        attention = self.hidden * (self.query_width + self.key_width) * (1 + self.value_dim / self.key_dim)
        mean = sum(size.matrices - size.adapters for size in self.block_sizes) / self.blocks
        return max(0.0, mean - attention) / (3 * self.hidden)

    @property
    def head_parameters(self) -> int:
        """Weights of the head (or of the embedding that stands for it)."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(size.parameters for size in self.block_sizes) + self.other_parameters


@dataclass(frozen=True)
class Learning:
    """What learns, as the planner sees it.

    Attributes:
        blocks: ids of the blocks that learn.
        everything: all parameters learn, those outside the blocks too.
        adapter_rank: of these blocks only adapters learn, of this rank; 0: the blocks do.
    """

    blocks: frozenset[int]
    everything: bool = False
    adapter_rank: int = 0

    def lowest(self) -> int | None:
        """The lowest block that learns; None when nothing does."""
        return 0 if self.everything else min(self.blocks, default=None)

    def includes(self, block: int) -> bool:
        """Whether a block learns."""
        return self.everything or block in self.blocks

    def trainable(self, shape: DecoderShape) -> tuple[BlockSize, ...]:
        """The blocks that learn."""
        sizes = enumerate(shape.block_sizes)
        return tuple(size for block, size in sizes if self.includes(block))

    def frozen(self, shape: DecoderShape) -> tuple[BlockSize, ...]:
        """The blocks that don't learn."""
        return tuple(size for block, size in enumerate(shape.block_sizes) if not self.includes(block))

    def backward(self, shape: DecoderShape) -> tuple[BlockSize, ...]:
        """The blocks that the backward pass goes through: those from the lowest that learns upward."""
        lowest = self.lowest()
        return () if lowest is None else shape.block_sizes[lowest:]

    def trainable_blocks(self, shape: DecoderShape) -> int:
        """How many blocks learn."""
        return len(self.trainable(shape))

    def backward_blocks(self, shape: DecoderShape) -> int:
        """How many blocks the backward pass goes through."""
        return len(self.backward(shape))

    def parameters(self, shape: DecoderShape) -> int:
        """Trainable parameters."""
        if self.adapter_rank:
            return sum(size.adapters for size in self.trainable(shape))
        outside = shape.other_parameters if self.everything else 0
        return sum(size.parameters for size in self.trainable(shape)) + outside

    def matrices(self, shape: DecoderShape) -> int:
        """Weights in the blocks that gradients are computed of, as `BlockSize.matrices` counts them."""
        return sum(size.adapters if self.adapter_rank else size.matrices for size in self.trainable(shape))
