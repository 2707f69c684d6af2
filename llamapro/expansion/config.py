"""The expanded model's config.json and the files that travel with it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamapro.errors import ModelRefused
from llamapro.expansion.families import Family
from llamapro.expansion.layout import Layout
from llamapro.expansion.record import CONFIG_KEY, CONFIG_NAME, ExpansionRecord, compact
from llamapro.expansion.source import HARMLESS_PRIVATE_FIELDS, companion_files, read_json

GENERATION_CONFIG_NAME = "generation_config.json"
CONFIG_DTYPES = {"bf16": "bfloat16", "float32": "float32"}


def expanded_config(config: Mapping[str, Any], family: Family, layout: Layout, dtype: str) -> dict[str, Any]:
    """The base's config with the new depth: per-layer lists expanded so that every original block keeps its kind.

    Args:
        dtype: "keep", "bf16" or "float32".

    Raises:
        ModelRefused: a per-layer list has another length than the base has blocks, or nobody declared it.
    """
    expanded = {field: value for field, value in config.items() if field not in HARMLESS_PRIVATE_FIELDS}
    for field, value in per_layer_lists(config, family).items():
        expanded[field] = [value[source] for source in layout.sources]
    expanded["num_hidden_layers"] = layout.blocks
    expanded["use_cache"] = True
    expanded.pop(CONFIG_KEY, None)
    if dtype in CONFIG_DTYPES:
        expanded["torch_dtype" if "torch_dtype" in expanded else "dtype"] = CONFIG_DTYPES[dtype]
    return expanded


def per_layer_lists(config: Mapping[str, Any], family: Family) -> dict[str, list[Any]]:
    """The config's lists with one entry per block, by field.

    Raises:
        ModelRefused: such a list has the wrong length, or its field is not declared for the family.
    """
    blocks = config["num_hidden_layers"]
    lists = {field: value for field, value in config.items() if isinstance(value, list) and "layer" in field}
    for field, value in lists.items():
        if field not in family.per_layer_fields:
            raise ModelRefused(f"config field {field} is not known for family {family.name}: it may depend on depth")
        if len(value) != blocks:
            raise ModelRefused(f"config field {field} has {len(value)} entries, but the model has {blocks} blocks")
    return lists


def write_config(folder: Path, config: Mapping[str, Any], record: ExpansionRecord) -> None:
    """Write config.json with the record's compact copy."""
    write_json(folder / CONFIG_NAME, {**config, CONFIG_KEY: compact(record)})


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files; the cache is on in what is written."""
    for path in companion_files(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, target / path)
    generation = read_json(target / GENERATION_CONFIG_NAME)
    if generation is not None and generation.get("use_cache") is False:
        write_json(target / GENERATION_CONFIG_NAME, generation | {"use_cache": True})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers does: indented, in the given order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
