"""FLOPs per token that a job really needs: frozen weights have no gradients, and nothing flows below the lowest
trainable block. Never 6N, which overstates this work by a third.

One multiplication and addition are two FLOPs. Attention is causal, so half of the square counts, over the whole
sequence or, in blocks that have one, the window; packed documents need less, so a rate computed from these numbers is
that of unpacked text. Of experts only those chosen count.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llamapro.planning.shape import BlockSize, DecoderShape, Learning

_HARDWARE_ATTENTION_BACKWARD = 2.5
_MODEL_ATTENTION_BACKWARD = 2.0


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs per token by kind.

    Attributes:
        forward_linear: all blocks' linears and the head.
        forward_attention: scores and values of all blocks.
        input_gradient: gradients of the linears' inputs, from the head down to the lowest trainable block.
        attention_backward: of the same blocks, without the recomputed scores.
        attention_recompute: the scores that flash kernels compute again.
        weight_gradient: gradients of trainable linears.
        block_recompute: whole blocks that are computed again in the backward pass.
        frozen_linear: of the linears' work in all passes, that of frozen blocks' weights.
    """

    forward_linear: float
    forward_attention: float
    input_gradient: float
    attention_backward: float
    attention_recompute: float
    weight_gradient: float
    block_recompute: float = 0.0
    frozen_linear: float = 0.0

    @property
    def forward(self) -> float:
        """The forward pass: what held-out text costs."""
        return self.forward_linear + self.forward_attention

    @property
    def model(self) -> float:
        """What the job needs: the numerator of MFU."""
        backward = self.input_gradient + self.attention_backward + self.weight_gradient
        return self.forward + backward

    @property
    def hardware(self) -> float:
        """What is really executed, with everything that is computed again: the numerator of HFU."""
        return self.model + self.attention_recompute + self.block_recompute

    @property
    def linear(self) -> float:
        """Matrix products of linears, in all passes; those of blocks computed again not counted."""
        return self.forward_linear + self.input_gradient + self.weight_gradient


def flops_per_token(
    shape: DecoderShape, learning: Learning, sequence_length: int, recomputed: Collection[int] = ()
) -> FlopsPerToken:
    """Count the FLOPs of one token of a training step.

    Args:
        sequence_length: tokens that attention runs over.
        recomputed: blocks that are computed again in the backward pass.
    """
    backward = learning.backward(shape)
    head = 2 * shape.head_parameters
    backward_attention = _MODEL_ATTENTION_BACKWARD * _attention(shape, backward, sequence_length)
    again = 0.0 if shape.scores_kept else _HARDWARE_ATTENTION_BACKWARD / _MODEL_ATTENTION_BACKWARD - 1
    frozen = (*_frozen(shape.block_sizes, learning, 0), *_frozen(backward, learning, shape.blocks - len(backward)))
    return FlopsPerToken(
        forward_linear=_linears(shape.block_sizes) + head,
        forward_attention=_attention(shape, shape.block_sizes, sequence_length),
        input_gradient=_linears(backward) + (head if backward else 0),
        attention_backward=backward_attention,
        attention_recompute=again * backward_attention,
        weight_gradient=2.0 * learning.matrices(shape) + (head if learning.everything else 0),
        block_recompute=sum(again_flops_of_block(shape, block, sequence_length) for block in recomputed),
        frozen_linear=_linears(frozen),
    )


def again_flops_of_block(shape: DecoderShape, block: int, sequence_length: int) -> float:
    """FLOPs per token of computing a block again: its forward pass, up to the last result that is needed."""
    sizes = shape.block_sizes[block : block + 1]
    return _linears(sizes) + _attention(shape, sizes, sequence_length) - 2 * sizes[0].last_matrix


def _frozen(blocks: Sequence[BlockSize], learning: Learning, first: int) -> list[BlockSize]:
    return [size for block, size in enumerate(blocks, start=first) if not learning.includes(block)]


def _linears(blocks: Sequence[BlockSize]) -> float:
    return float(sum(2 * block.matrices for block in blocks))


def _attention(shape: DecoderShape, blocks: Sequence[BlockSize], sequence_length: int) -> float:
    """Scores and their sums of values, in these blocks."""
    widths = shape.heads * (shape.key_dim + shape.value_dim)
    return sum(2 * widths * _keys_per_token(block.window, sequence_length) for block in blocks)


def _keys_per_token(window: int | None, sequence_length: int) -> float:
    """How many keys a token attends to, on average over the sequence."""
    reach = sequence_length if window is None else min(window, sequence_length)
    return reach - reach * reach / (2 * sequence_length)
