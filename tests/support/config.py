"""Run configurations for tests: the smallest valid mapping, and files of it."""

from pathlib import Path
from typing import Any

import orjson

from llamapro.config.load import load_config
from llamapro.config.root import RunConfig


def minimal_values(**sections: Any) -> dict[str, Any]:
    """A valid configuration with two weighted sources; each argument lays a mapping over the section of its name."""
    values: dict[str, Any] = {
        "model": {"path": "work/model"},
        "data": {
            "sources": {"law": {"path": "data/law", "weight": 0.8}, "wiki": {"path": "data/wiki", "weight": 0.2}},
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def write_config(folder: Path, text: str) -> Path:
    """Write a configuration file."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def config_of(folder: Path, **sections: Any) -> RunConfig:
    """Load `minimal_values(**sections)` through a file (JSON is YAML)."""
    return load_config(write_config(folder, orjson.dumps(minimal_values(**sections)).decode()))
