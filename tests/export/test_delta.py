"""A delta with its base gives the same bytes as the full export, and refuses every other base."""

from pathlib import Path

import pytest
import torch

from llamapro.errors import Corrupted, UserError
from llamapro.expansion.expand import expand
from llamapro.export.delta import DELTA_NAME
from llamapro.export.export import export
from tests.export.test_export import flip_bit
from tests.support.exports import (
    TinyRun,
    block_of,
    files_of,
    make_run,
    random_masters,
    tensors_of,
    write_checkpoint,
    write_run_files,
)
from tests.support.models import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("dtype", ["keep", "float32"])
@pytest.mark.parametrize("base", ["base", "model"])
def test_delta_and_base_give_the_full_exports_bytes(tiny: TinyRun, tmp_path: Path, dtype: str, base: str) -> None:
    export(tiny.folder, tmp_path / "full", dtype=dtype)
    export(tiny.folder, tmp_path / "delta", dtype=dtype, delta=True)
    export(tmp_path / "delta", tmp_path / "rebuilt", base=str(getattr(tiny, base)))
    assert files_of(tmp_path / "rebuilt") == files_of(tmp_path / "full")


def test_a_base_in_a_wider_dtype_passes_through_the_expanded_models(tmp_path: Path) -> None:
    """float32 base → bf16 expansion → float32 export: the base's extra bits must not come back."""
    base = save_tiny_llama(tmp_path / "base", dtype=torch.float32)
    record = expand(str(base), tmp_path / "model", new_blocks=2, dtype="bf16")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(tmp_path / "model").items()}
    new = {name: shape for name, shape in shapes.items() if block_of(record, name) in record.new_blocks}
    write_checkpoint(tmp_path / "run", random_masters(new), record)
    write_run_files(tmp_path / "run", tmp_path / "model")
    export(tmp_path / "run", tmp_path / "full", dtype="float32")
    export(tmp_path / "run", tmp_path / "delta", dtype="float32", delta=True)
    export(tmp_path / "delta", tmp_path / "rebuilt", base=str(base))
    assert files_of(tmp_path / "rebuilt") == files_of(tmp_path / "full")


def test_delta_holds_only_the_trained_tensors_and_does_not_look_like_a_model(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "delta", delta=True)
    assert tensors_of(tmp_path / "delta/tensors").keys() == tiny.masters.keys()
    assert not (tmp_path / "delta/config.json").exists()
    assert not list((tmp_path / "delta").glob("*.safetensors"))


def test_another_base_is_refused_by_tensor(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "delta", delta=True)
    other = save_tiny_llama(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    with pytest.raises(Corrupted, match=r"tensor \S+ differs .* tests/tiny-llama"):
        export(tmp_path / "delta", tmp_path / "out", base=str(other))
    shallow = save_tiny_llama(tmp_path / "shallow", blocks=3, dtype=torch.bfloat16)
    with pytest.raises(Corrupted, match=r"model\.layers\.3\S+ is missing"):
        export(tmp_path / "delta", tmp_path / "out", base=str(shallow))
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_the_delta_or_a_changed_file_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "delta", delta=True)
    name = next(iter(tiny.masters))
    flip_bit(tmp_path / "delta/tensors", name)
    with pytest.raises(Corrupted, match=name):
        export(tmp_path / "delta", tmp_path / "out", base=str(tiny.base))
    export(tiny.folder, tmp_path / "delta2", delta=True)
    (tmp_path / "delta2/files/tokenizer_config.json").write_text("{}")
    with pytest.raises(Corrupted, match="tokenizer_config"):
        export(tmp_path / "delta2", tmp_path / "out", base=str(tiny.base))


@pytest.mark.parametrize("name", ["../escaped.json", "/tmp/escaped.json", "modeling.py"])
def test_a_delta_can_not_write_outside_its_target_nor_bring_code(tiny: TinyRun, tmp_path: Path, name: str) -> None:
    export(tiny.folder, tmp_path / "delta", delta=True)
    index = tmp_path / "delta" / DELTA_NAME
    index.write_text(index.read_text().replace('"README.md"', f'"{name}"'))
    with pytest.raises(Corrupted, match="no file of an export"):
        export(tmp_path / "delta", tmp_path / "out", base=str(tiny.base))


def test_options_that_a_delta_can_not_honour_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "delta", delta=True)
    for options, message in (
        ({}, "tests/tiny-llama"),
        ({"dtype": "float32", "base": "x"}, "--dtype float32"),
        ({"delta": True, "base": "x"}, "delta already"),
        ({"model": tiny.model, "base": "x"}, "--model"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "delta", tmp_path / "out", **options)  # type: ignore[arg-type]
