"""Bytes that blocks keep for their backward pass: run operation by operation, or with fused kernels."""

from llamapro.planning.shape import DecoderShape

FLOAT32_BYTES = 4


def kept_bytes(
    shape: DecoderShape, block: int, trainable: bool, width: int, sequence_length: int, *, fused: bool = False
) -> float:
    """Bytes per token that a block keeps.

    Operation by operation it is what transformers' own code keeps, where that could be seen; otherwise what a gated
    block of that size does.

    Args:
        width: bytes per activation, 2 for bf16.
        fused: the block is compiled into kernels that keep inputs only.
    """
    size = shape.block_sizes[block]
    own = float(size.linears * size.adapter_rank * width)  # what each adapter's A computes, for the gradient of its B
    if size.kept and not fused:
        return own + size.kept[width, trainable].at(sequence_length)
    own += score_bytes(shape, width, sequence_length) if shape.scores_kept else 0
    if fused:
        return own + (fused_trainable_block_bytes if trainable else fused_frozen_block_bytes)(shape, width)
    return own + (trainable_block_bytes if trainable else frozen_block_bytes)(shape, width)


def score_bytes(shape: DecoderShape, width: int, sequence_length: int) -> float:
    """Bytes per token that attention without a fused kernel keeps: scores, mask and weights of a whole row."""
    return shape.heads * sequence_length * (FLOAT32_BYTES + 2 * width + 1)


def frozen_block_bytes(shape: DecoderShape, width: int) -> float:
    """Bytes per token that a frozen block keeps, run operation by operation.

    Beyond what fused kernels keep: the norms keep float32 copies of their inputs and their scales, the gate its
    activation.
    """
    norms = 2 * (shape.hidden * (FLOAT32_BYTES - width) + FLOAT32_BYTES)
    return fused_frozen_block_bytes(shape, width) + norms + shape.intermediate * width


def trainable_block_bytes(shape: DecoderShape, width: int) -> float:
    """Bytes per token that a trainable block keeps, run operation by operation.

    Beyond a frozen one: each norm's result before and after its weight, and the product that the last linear takes.
    """
    return frozen_block_bytes(shape, width) + (4 * shape.hidden + shape.intermediate) * width


def fused_frozen_block_bytes(shape: DecoderShape, width: int) -> float:
    """Bytes per token that a frozen block keeps with fused kernels, which keep inputs only.

    Both norms' inputs, query, key, value, the attention's result and its log-sum-exp, gate and up.
    """
    attention = (2 * shape.query_width + 2 * shape.key_width) * width + shape.heads * FLOAT32_BYTES
    return 2 * shape.hidden * width + attention + 2 * shape.intermediate * width


def fused_trainable_block_bytes(shape: DecoderShape, width: int) -> float:
    """The same for a trainable block: its linears' inputs as well, which are the norms' results and the product."""
    return fused_frozen_block_bytes(shape, width) + (2 * shape.hidden + shape.intermediate) * width


def block_at_work_bytes(shape: DecoderShape, width: int) -> float:
    """Bytes per token that come and go while a block's backward pass runs.

    Gradients of the product, of gate and up; of the block's result and of its input; the rotary tables.
    """
    return (3 * shape.intermediate + 2 * shape.hidden + 2 * shape.key_dim) * width


def fp8_cast_bytes(shape: DecoderShape, *, fused: bool) -> float:
    """Bytes per token that come and go while the widest gradient is put into FP8.

    Its codes; operation by operation also the gradient times the weights' scales, and over its own, in float32.
    """
    return shape.intermediate * (1 if fused else 1 + 2 * FLOAT32_BYTES)


def outside_bytes(shape: DecoderShape, width: int) -> float:
    """Bytes per token held outside the blocks while the loss is computed.

    The final norm's input (in float32 that is two of width 2), the gradient of its result, and the rotary tables.
    """
    return (3 * shape.hidden + 2 * shape.key_dim) * width
