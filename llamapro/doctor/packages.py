"""Whether the installed packages are those that this version needs. Loads none of them."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

import llamapro
from llamapro.doctor.finding import FAILED, OK, Finding

SHOWN = ("torch", "deepspeed", "transformers")
TRACKED = (*SHOWN, "safetensors", "tokenizers", "numpy", "triton")


def check_packages() -> list[Finding]:
    """Python, this library, the packages that decide how training runs, and the others in one line."""
    needed = [Requirement(line) for line in requires("llamapro") or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = [Finding("python", OK, platform.python_version()), Finding("llamapro", OK, llamapro.__version__)]
    found += [check_package(one) for one in needed if one.name in SHOWN]
    others = [check_package(one) for one in needed if one.name not in SHOWN]
    wrong = [one for one in others if one.state == FAILED]
    return found + (wrong or [Finding("other packages", OK, f"{len(others)} as needed")])


def check_package(needed: Requirement) -> Finding:
    """Whether one package is there, in a version that is allowed."""
    try:
        present = version(needed.name)
    except PackageNotFoundError:
        return Finding(needed.name, FAILED, f"not installed; pip install '{needed.name}{needed.specifier}'")
    if not needed.specifier.contains(present, prereleases=True):
        return Finding(needed.name, FAILED, f"{present}, but {needed.specifier} is needed; install that")
    return Finding(needed.name, OK, present)


def versions() -> dict[str, str]:
    """What all hosts of a job must have alike, by name."""
    found = {"python": platform.python_version(), "llamapro": llamapro.__version__}
    for name in TRACKED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
