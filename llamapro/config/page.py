"""The reference page of the run configuration, written from the schema itself."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llamapro.config.availability import UNAVAILABLE
from llamapro.config.root import RunConfig
from llamapro.config.schema import expected, field_annotation, models_in

_HEAD = """# Run configuration

One YAML 1.2 file describes a run. `--section.field value` on the command line overrides it, with values written as in
YAML: `--schedule.learning_rate 1e-4 --model.trainable 4 9 --guards.retention null`. `--help` lists every setting with
the value that your file gives it. Only `model.path` and `data.sources` must be given. Paths are relative to the working
directory. Unknown keys, wrong values and settings that contradict each other are all reported at once, before anything
starts.

This page is generated from the schema (`llamapro/config/`).
"""


def reference_page() -> str:
    """The page as Markdown: one table per section, then the settings that are not available yet."""
    parts = [_HEAD]
    for name, field in RunConfig.model_fields.items():
        (section,) = models_in(field.annotation)
        parts.append(f"## {name}\n\n{field.description}\n\n{_table(section)}")
        parts.extend(_nested(section, name))
    rows = [f"- `{row.key}`: {row.instead}" for row in UNAVAILABLE]
    parts.append("## Not available in this version\n\nThese settings are known; some of their values are refused.\n")
    return "\n".join([*parts, *rows]) + "\n"


def _nested(section: type[BaseModel], key: str) -> list[str]:
    """Tables of the mappings inside a section."""
    parts = []
    for name, field in section.model_fields.items():
        for model in models_in(field.annotation):
            description = " ".join((model.__doc__ or "").split())
            parts.append(f"### In `{key}.{name}`\n\n{description}\n\n{_table(model)}")
    return parts


def _table(section: type[BaseModel]) -> str:
    rows = [_row(name, field) for name, field in section.model_fields.items()]
    return "\n".join(["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    allowed = expected(field_annotation(field)).replace("|", "\\|")
    return f"| `{name}` | {default} | {allowed} | {field.description} |"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
