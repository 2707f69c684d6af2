"""The expanded model's config.json and the files that travel with it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamapro.errors import Corrupted, ModelRefused
from llamapro.expansion.depth import spelled_out
from llamapro.expansion.families import Family, count_of_blocks
from llamapro.expansion.layout import Layout
from llamapro.expansion.record import CONFIG_KEY, CONFIG_NAME, ExpansionRecord, compact
from llamapro.expansion.source import BASE_CARD_NAME, CARD_NAME, HARMLESS_PRIVATE_FIELDS, companion_files, read_json

GENERATION_CONFIG_NAME = "generation_config.json"
CONFIG_DTYPES = {"bf16": "bfloat16", "float32": "float32"}


def expanded_config(config: Mapping[str, Any], family: Family, layout: Layout, dtype: str) -> dict[str, Any]:
    """The base's config with the new depth, so that every original block keeps its kind and a copy has its source's.

    Args:
        dtype: "keep", "bf16" or "float32".

    Raises:
        ModelRefused: a field depends on depth in a way that can't be expressed for this layout, or nobody declared it.
    """
    refuse_undeclared_lists(config, family)
    expanded = {field: value for field, value in config.items() if field not in HARMLESS_PRIVATE_FIELDS}
    stated = spelled_out(config, family.depth_rules)
    for rule in family.depth_rules:
        expanded |= rule.expand(stated, layout)
    expanded = {field: value for field, value in expanded.items() if value is not None or config.get(field) is None}
    expanded |= {field: layout.blocks for field in family.blocks_fields if field in config}
    expanded["use_cache"] = True
    expanded.pop(CONFIG_KEY, None)
    if dtype in CONFIG_DTYPES:
        expanded["torch_dtype" if "torch_dtype" in expanded else "dtype"] = CONFIG_DTYPES[dtype]
    return expanded


def refuse_undeclared_lists(config: Mapping[str, Any], family: Family) -> None:
    """Refuse a config with a list that is named after layers and that no rule of the family covers.

    Raises:
        ModelRefused: names the field.
    """
    known = {field for rule in family.depth_rules for field in rule.fields}
    for field, value in config.items():
        if isinstance(value, list) and value and "layer" in field and field not in known:
            raise ModelRefused(f"config field {field} is not known for family {family.name}: it may depend on depth")


def depth_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    """What in a config's depth-dependent fields contradicts its number of blocks."""
    try:
        blocks = count_of_blocks(family, config)
        unchanged = Layout(blocks, tuple(range(blocks)), (False,) * blocks)
        expanded_config(config, family, unchanged, "keep")
    except (ModelRefused, Corrupted) as error:
        return [str(error)]
    return []


def write_config(folder: Path, config: Mapping[str, Any], record: ExpansionRecord) -> None:
    """Write config.json with the record's compact copy."""
    write_json(folder / CONFIG_NAME, {**config, CONFIG_KEY: compact(record)})


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence files and the base's card; the cache is on there."""
    for path in companion_files(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, target / path)
    if (source / CARD_NAME).is_file() and not (source / BASE_CARD_NAME).exists():
        shutil.copyfile(source / CARD_NAME, target / BASE_CARD_NAME)
    generation = read_json(target / GENERATION_CONFIG_NAME)
    if generation is not None and generation.get("use_cache") is False:
        write_json(target / GENERATION_CONFIG_NAME, generation | {"use_cache": True})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers does: indented, in the given order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
