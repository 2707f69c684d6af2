"""The block table: index, origin, zeroed tensors, trained or not, through repeated expansions; plain models too."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llamapro.errors import ModelRefused
from llamapro.expansion.blocks import describe_blocks
from llamapro.expansion.expand import expand
from llamapro.expansion.record import Trained, compact, write_record
from tests.support.expansion import update_json
from tests.support.models import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    base = save_tiny_llama(folder / "base", blocks=2)
    record = expand(str(base), folder / "one", new_blocks=1)
    trained = record.model_copy(update={"trained": Trained(blocks=(2,))})
    write_record(folder / "one", trained)
    update_json(folder / "one" / "config.json", {"llamapro": compact(trained)})
    expand(str(folder / "one"), folder / "two", new_blocks=1, placement="prefix")
    return folder


def test_a_plain_model(folder: Path) -> None:
    described = describe_blocks(folder / "base")
    assert described.record is None
    assert [(row.index, row.new, row.trained, row.zeroed) for row in described.blocks] == [
        (0, False, False, ()),
        (1, False, False, ()),
    ]


def test_an_expanded_model(folder: Path) -> None:
    rows = describe_blocks(folder / "one").blocks
    assert [(row.new, row.added_by, row.base_index, row.trained) for row in rows] == [
        (False, None, 0, False),
        (False, None, 1, False),
        (True, 1, 1, True),
    ]
    assert rows[2].zeroed == ("mlp.down_proj.weight", "self_attn.o_proj.weight")


def test_a_model_expanded_twice(folder: Path) -> None:
    rows = describe_blocks(folder / "two").blocks
    assert [(row.new, row.added_by, row.base_index, row.trained) for row in rows] == [
        (True, 2, 0, False),
        (False, None, 0, False),
        (False, None, 1, False),
        (False, 1, 2, True),
    ]


@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_parameters_add_up_to_transformers_count(folder: Path, name: str) -> None:
    described = describe_blocks(folder / name)
    counted = described.other_parameters + sum(row.parameters for row in described.blocks)
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_no_supported_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused):
        describe_blocks(tmp_path)
