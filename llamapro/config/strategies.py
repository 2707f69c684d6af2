"""The DeepSpeed files: `ds_configs/zeroN.json` as they are installed, and a user's own that is laid over one."""

import importlib.resources
import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import llamapro
from llamapro.errors import ConfigError

Json = dict[str, Any]


def strategy(zero_stage: int) -> Json:
    """The JSON file of a ZeRO stage, as it is installed."""
    text = _folder().joinpath(f"zero{zero_stage}.json").read_text(encoding="utf-8")
    values: Json = json.loads(text)
    return values


def read_overlay(path: Path) -> Json:
    """Read a JSON file that is to be laid over a strategy.

    Raises:
        ConfigError: it is not a JSON object, or has a key twice.
    """
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        names = [name for name, _ in pairs]
        repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"engine.deepspeed: not valid JSON: {error}"], str(path)) from error
    except OSError as error:
        raise ConfigError([f"engine.deepspeed: can't be read: {error.strerror}"], str(path)) from error
    if not isinstance(values, dict):
        raise ConfigError(["engine.deepspeed: must hold one JSON object"], str(path))
    if repeated:
        raise ConfigError([f"{name}: the key stands there twice; keep one" for name in repeated], str(path))
    return values


def _folder() -> Traversable:
    """The folder of the JSON files: installed with the package, or beside it in the repository."""
    try:
        return importlib.resources.files("llamapro.ds_configs")
    except ModuleNotFoundError:
        return Path(llamapro.__file__).resolve().parents[1] / "ds_configs"
