"""An environment without some package: a folder for PYTHONPATH whose sitecustomize hides it, as if not installed."""

from pathlib import Path

_SITECUSTOMIZE = """
import importlib.machinery

found = importlib.machinery.PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == {package!r} else found(name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def hide_package(folder: Path, package: str) -> Path:
    """Write sitecustomize.py into `folder`; put the folder first on PYTHONPATH to use it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(package=package))
    return folder
