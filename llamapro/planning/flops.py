"""FLOPs per token that a job really needs: frozen weights have no gradients, and nothing flows below the lowest
trainable block. Never 6N, which overstates this work by a third.

One multiplication and addition are two FLOPs. Attention is causal, so half of the square counts, over the whole
sequence; packed documents need less, so a rate computed from these numbers is that of unpacked text.
"""

from dataclasses import dataclass

from llamapro.planning.shape import DecoderShape, Learning

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
    """

    forward_linear: float
    forward_attention: float
    input_gradient: float
    attention_backward: float
    attention_recompute: float
    weight_gradient: float

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
        """What is really executed, with the recomputation in attention."""
        return self.model + self.attention_recompute


def flops_per_token(shape: DecoderShape, learning: Learning, sequence_length: int) -> FlopsPerToken:
    """Count the FLOPs of one token of a training step.

    Args:
        sequence_length: tokens that attention runs over.
    """
    backward_blocks = learning.backward_blocks(shape)
    head = 2 * shape.head_parameters
    block = 2 * shape.block_linear_parameters
    attention = 2 * sequence_length * shape.query_width
    backward_attention = backward_blocks * attention
    return FlopsPerToken(
        forward_linear=shape.blocks * block + head,
        forward_attention=shape.blocks * attention,
        input_gradient=backward_blocks * block + (head if backward_blocks else 0),
        attention_backward=_MODEL_ATTENTION_BACKWARD * backward_attention,
        attention_recompute=(_HARDWARE_ATTENTION_BACKWARD - _MODEL_ATTENTION_BACKWARD) * backward_attention,
        weight_gradient=learning.trainable_blocks(shape) * block + (head if learning.everything else 0),
    )
