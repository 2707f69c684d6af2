"""The rank file is plain safetensors; what is read back is what was handed over."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llamapro.checkpoint import rank_file
from llamapro.checkpoint.rank_file import plan_rank_file, write_rank_file
from llamapro.files.digests import xxh3_file
from tests.support.checkpoint import Part

NAME = "rank-00000.safetensors"


def fragments() -> list[Part]:
    values = torch.arange(24, dtype=torch.float32)
    transposed = torch.arange(12.0).reshape(3, 4).t().reshape(-1)
    return [
        Part("a.weight", 0, (4, 3), {"master": values[:10], "exp_avg": values[10:20]}),
        Part("a.weight", 10, (4, 3), {"master": values[20:22], "exp_avg": values[22:]}),
        Part("b.bias", 0, (12,), {"master": transposed, "exp_avg": -transposed}),
    ]


def test_the_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    plan = plan_rank_file(NAME, fragments())
    entry = write_rank_file(tmp_path / NAME, plan)
    assert entry.size == plan.nbytes == (tmp_path / NAME).stat().st_size
    assert entry.digest == xxh3_file(tmp_path / NAME)
    with safe_open(tmp_path / NAME, framework="pt") as file:
        for fragment in fragments():
            for key, tensor in fragment.tensors.items():
                assert torch.equal(file.get_tensor(f"{fragment.name}:{fragment.start}:{key}"), tensor)


def test_the_places_in_the_index_are_where_the_bytes_are(tmp_path: Path) -> None:
    plan = plan_rank_file(NAME, fragments())
    write_rank_file(tmp_path / NAME, plan)
    data = (tmp_path / NAME).read_bytes()
    for (name, shape, place), fragment in zip(plan.placed, fragments(), strict=True):
        assert (name, shape, place.start, place.count) == (
            fragment.name,
            fragment.shape,
            fragment.start,
            fragment.count,
        )
        for key, tensor in fragment.tensors.items():
            found = torch.frombuffer(bytearray(data), dtype=torch.float32, count=place.count, offset=place.offsets[key])
            assert torch.equal(found, tensor)


def test_large_tensors_are_copied_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_file, "CHUNK_ELEMENTS", 4)
    plan = plan_rank_file(NAME, fragments())
    assert max(len(piece) for piece in list(rank_file._pieces(plan))[1:]) == 16
    entry = write_rank_file(tmp_path / NAME, plan)
    assert entry.digest == xxh3_file(tmp_path / NAME)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_rank_file(tmp_path / "whole", plan_rank_file(NAME, fragments()))
    write = os.write
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    assert write_rank_file(tmp_path / "short", plan_rank_file(NAME, fragments())) == whole
    assert xxh3_file(tmp_path / "short") == whole.digest


@pytest.mark.parametrize(
    "bad",
    [
        Part("a", 0, (2,), {"master": torch.zeros(2, dtype=torch.bfloat16)}),
        Part("a", 0, (2,), {"master": torch.zeros(1, 2)}),
        Part("a", 0, (2,), {"master": torch.zeros(2), "exp_avg": torch.zeros(1)}),
        Part("a", 0, (2,), {"exp_avg": torch.zeros(2)}),
    ],
)
def test_fragments_that_are_not_equally_long_float32_are_a_bug(bad: Part) -> None:
    with pytest.raises(AssertionError, match="a"):
        plan_rank_file(NAME, [bad])


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_rank_file(tmp_path / NAME, plan_rank_file(NAME, fragments()))
    assert (tmp_path / NAME).read_bytes() == b"old"
