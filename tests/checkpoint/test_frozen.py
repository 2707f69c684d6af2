"""The proof agrees with the record's own fold, over any cut, and notices every single bit."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch

from llamapro.checkpoint import frozen
from llamapro.checkpoint.frozen import FrozenProof, fold_on_device, prove_frozen, torch_fold
from llamapro.expansion.record import ExpansionRecord, Trained
from llamapro.files.digests import FOLD_MASK, fold
from llamapro.ranks import Ranks
from tests.support.checkpoint import on_threads, tiny_record

Slices = Iterator[tuple[str, int, torch.Tensor]]


def base_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")
    tensors = {name: torch.randn(7, 9, generator=generator).to(dtype) for name in names}
    return tensors | {"model.layers.3.self_attn.q_proj.bias": torch.zeros(5, dtype=dtype)}


def cut(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> Slices:
    """This rank's part of every tensor, handed over in two slices."""
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        piece = -(-flat.numel() // ranks.world_size)
        low, high = ranks.rank * piece, min(flat.numel(), (ranks.rank + 1) * piece)
        middle = (low + high) // 2
        yield name, low, flat[low:middle]
        yield name, middle, flat[middle:high]


def proof_of(
    tensors: Mapping[str, torch.Tensor], record: ExpansionRecord, trainable: tuple[str, ...] = (), world_size: int = 1
) -> FrozenProof:
    proofs = on_threads(world_size, lambda ranks: prove_frozen(cut(tensors, ranks), record, ranks, trainable))
    assert all(proof == proofs[0] for proof in proofs), proofs
    assert isinstance(proofs[0], FrozenProof)
    return proofs[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("start", [0, 3, 2**33])
@pytest.mark.parametrize("fold_tensor", [torch_fold, fold_on_device])
def test_the_fold_on_tensors_is_the_fold_on_bytes(
    fold_tensor: Callable[[torch.Tensor, int], torch.Tensor],
    dtype: torch.dtype,
    start: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen, "CHUNK_ELEMENTS", 100)
    bits = np.random.default_rng(0).integers(0, 256, 1001 * dtype.itemsize, dtype=np.uint8)
    values = torch.from_numpy(bits).view(dtype)
    expected = fold(bits.tobytes(), dtype.itemsize, start)
    assert int(fold_tensor(values, start)) & FOLD_MASK == expected
    split = [int(fold_tensor(part, start + offset)) for part, offset in ((values[:400], 0), (values[400:], 400))]
    assert sum(split) & FOLD_MASK == expected
    assert int(fold_tensor(values, start + 1)) & FOLD_MASK != expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_untouched_tensors_equal_the_record(world_size: int) -> None:
    proof = proof_of(base_tensors(), tiny_record(base_tensors()), world_size=world_size)
    assert proof == FrozenProof(4, 4, ())
    assert str(proof) == "4 of 4 base tensors equal the record"


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_flipped_bit_is_noticed_and_named(world_size: int) -> None:
    record = tiny_record(base_tensors())
    for place, bit in ((0, 0), (31, 15), (62, 7)):
        tensors = base_tensors()
        tensors["model.layers.2.mlp.up_proj.weight"].flatten().view(torch.int16)[place] ^= (
            1 << bit if bit < 15 else -32768
        )
        proof = proof_of(tensors, record, world_size=world_size)
        assert proof.equal == 3 and proof.different == ("model.layers.2.mlp.up_proj.weight (bits differ)",)
        assert str(proof) == (
            "3 of 4 base tensors equal the record; different: model.layers.2.mlp.up_proj.weight (bits differ)"
        )


def test_float32_compute_on_a_bfloat16_record_is_compared_exactly() -> None:
    record = tiny_record(base_tensors())
    tensors = {name: tensor.float() for name, tensor in base_tensors().items()}
    assert proof_of(tensors, record, world_size=2).different == ()
    # The lowest bit of a float32 is lost in bfloat16: the cast alone would hide it.
    embedding = tensors["model.embed_tokens.weight"]
    embedding.view(-1).view(torch.int32)[11] ^= 1
    assert torch.equal(embedding.bfloat16(), base_tensors()["model.embed_tokens.weight"])
    assert proof_of(tensors, record).different == ("model.embed_tokens.weight (1 elements are not BF16 values)",)


def test_a_bfloat16_copy_of_a_float32_record_differs() -> None:
    tensors = base_tensors(torch.float32)
    record = tiny_record(tensors, "F32")
    assert proof_of(tensors, record).different == ()
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert proof_of(rounded, record).equal == 1, "only the zeros survive rounding"


def test_a_tensor_nobody_looked_at_is_no_proof() -> None:
    record = tiny_record(base_tensors())
    tensors = base_tensors()
    del tensors["model.layers.3.self_attn.q_proj.bias"]
    proof = proof_of(tensors, record)
    assert proof.different == ("model.layers.3.self_attn.q_proj.bias (0 of 5 elements were looked at)",)
    assert proof_of({}, record).equal == 0


def test_trained_tensors_and_new_blocks_are_not_counted() -> None:
    record = tiny_record(base_tensors())
    tensors = base_tensors() | {"model.layers.1.mlp.up_proj.weight": torch.ones(3)}
    assert proof_of(tensors, record) == FrozenProof(4, 4, ())
    del tensors["model.layers.0.mlp.up_proj.weight"]
    assert proof_of(tensors, record, trainable=("model.layers.0.mlp.up_proj.weight",)) == FrozenProof(3, 3, ())
    earlier = record.model_copy(update={"trained": Trained(blocks=(2,), tensors=("model.embed_tokens.weight",))})
    tensors["model.layers.2.mlp.up_proj.weight"].zero_()
    tensors["model.embed_tokens.weight"].zero_()
    assert proof_of(tensors, earlier, trainable=("model.layers.0.mlp.up_proj.weight",)) == FrozenProof(1, 1, ())


def test_many_differences_are_counted_not_listed() -> None:
    proof = FrozenProof(1, 8, tuple(f"t{i}" for i in range(7)))
    assert str(proof) == "1 of 8 base tensors equal the record; different: t0, t1, t2, t3, t4 and 2 more"
