"""A manifest notices every missing, added, resized and changed file."""

from pathlib import Path

import pytest

from llamapro.errors import Corrupted
from llamapro.files.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_files,
    describe_files,
    read_manifest,
    write_manifest,
)


@pytest.fixture(params=["sha256", "xxh3-128"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"alpha")
    (tmp_path / "sub" / "b").write_bytes(b"beta")
    files = describe_files(tmp_path, request.param)
    write_manifest(
        tmp_path, Manifest(kind="thing", format_version=2, algorithm=request.param, files=files, facts={"n": 1})
    )
    return tmp_path


def test_an_unchanged_folder_has_no_problems(folder: Path) -> None:
    manifest = read_manifest(folder, "thing", 2)
    assert set(manifest.files) == {"a", "sub/b"}
    assert check_files(folder, manifest) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "a").unlink(), "a is missing"),
        (lambda folder: (folder / "a").write_bytes(b"alphas"), "has 6 bytes"),
        (lambda folder: (folder / "sub" / "b").write_bytes(b"betA"), "b differs"),
        (lambda folder: (folder / "c").write_bytes(b""), "c is not in the manifest"),
    ],
)
def test_every_difference_is_named(folder: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    change(folder)
    (problem,) = check_files(folder, read_manifest(folder, "thing", 2))
    assert words in problem


def test_sizes_alone_do_not_see_a_changed_byte(folder: Path) -> None:
    (folder / "a").write_bytes(b"alphA")
    manifest = read_manifest(folder, "thing", 2)
    assert check_files(folder, manifest, digests=False) == []
    assert len(check_files(folder, manifest)) == 1


def test_a_missing_foreign_newer_or_broken_manifest_is_refused(folder: Path) -> None:
    with pytest.raises(Corrupted, match="not a checkpoint"):
        read_manifest(folder, "checkpoint", 2)
    with pytest.raises(Corrupted, match="format version 2"):
        read_manifest(folder, "thing", 1)
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(Corrupted, match="can't be read"):
        read_manifest(folder, "thing", 2)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(Corrupted, match="never finished"):
        read_manifest(folder, "thing", 2)
