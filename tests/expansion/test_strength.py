"""Which blocks lead back to a base, by the record alone."""

import pytest

from llamapro.errors import UserError
from llamapro.expansion.expand import expand
from llamapro.expansion.families import family_named
from llamapro.expansion.record import ExpansionRecord, LineageEntry, Trained, read_record
from llamapro.expansion.strength import blocks_above_base, dialled_tensor
from tests.support.models import save_tiny_llama


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> ExpansionRecord:
    root = tmp_path_factory.mktemp("record")
    save_tiny_llama(root / "base")
    expand(str(root / "base"), root / "model", new_blocks=2)
    found = read_record(root / "model")
    assert found is not None and found.new_blocks == (2, 5)
    return found


def with_history(record: ExpansionRecord, now: Trained, *earlier: tuple[tuple[int, ...], Trained]) -> ExpansionRecord:
    entries = tuple(
        LineageEntry(
            base_id="b",
            tool_version="0",
            base_blocks=2,
            blocks=3,
            record_digest="d",
            new_blocks=blocks,
            trained=trained,
        )
        for blocks, trained in earlier
    )
    return record.model_copy(update={"trained": now, "lineage": entries})


@pytest.mark.parametrize(
    ("now", "earlier", "expected"),
    [
        (Trained(), [], (2, 5)),
        (Trained(blocks=(5,)), [], (2, 5)),
        (Trained(blocks=(2, 5)), [((1,), Trained(blocks=(1,)))], (2, 5)),
        (Trained(blocks=(1, 2, 5)), [((1,), Trained(blocks=(1,)))], (1, 2, 5)),
        (Trained(blocks=(1, 2)), [((0,), Trained(tensors=("model.norm.weight",))), ((1,), Trained())], (1, 2, 5)),
    ],
)
def test_blocks_of_as_many_generations_are_left_out_as_were_trained(
    record: ExpansionRecord,
    now: Trained,
    earlier: list[tuple[tuple[int, ...], Trained]],
    expected: tuple[int, ...],
) -> None:
    assert blocks_above_base(with_history(record, now, *earlier)) == expected


@pytest.mark.parametrize("trained", [Trained(blocks=(0, 2, 5)), Trained(blocks=(2,), tensors=("lm_head.weight",))])
def test_a_trained_base_has_no_way_back(record: ExpansionRecord, trained: Trained) -> None:
    moved = str((set(trained.blocks) - {2, 5} or {"lm_head.weight"}).pop())
    with pytest.raises(UserError, match=moved):
        blocks_above_base(with_history(record, trained))
    with pytest.raises(UserError, match=moved):
        blocks_above_base(with_history(record, Trained(blocks=(1,)), ((1,), trained)))


def test_declared_tensors_are_those_that_write_to_the_residual_stream(record: ExpansionRecord) -> None:
    family = family_named(record.family)
    assert {name for name in record.zeroed if dialled_tensor(family, name)} == set(record.zeroed)
    assert dialled_tensor(family, "model.layers.5.mlp.down_proj.weight") == (5, 0.0)
    for other in ("model.layers.5.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert dialled_tensor(family, other) is None
    assert dialled_tensor(family_named("gemma2"), "model.layers.1.post_feedforward_layernorm.weight") == (1, -1.0)


def test_strengths_in_a_record_change_no_digest(record: ExpansionRecord) -> None:
    plain = Trained(blocks=(0,))
    scaled = plain.model_copy(update={"strengths": {"0": 0.5}})
    before = with_history(record, plain, ((1,), plain))
    assert with_history(record, scaled, ((1,), scaled)).digest() == before.digest()
