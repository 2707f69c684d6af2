"""Under which licence a model is passed on: what the card of its base states, and the files that hold the terms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro import console
from llamapro.config.yaml_file import parse_scalar
from llamapro.expansion.source import BASE_CARD_NAME, CARD_NAME, TERMS

_FRONT_MATTER = re.compile(r"\s*---[^\S\n]*\r?\n(.*?)\n---[^\S\n]*\r?(?:\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Terms:
    """The licence of a base as its card names it, and the names of the files that were copied from it.

    Attributes:
        license: the hub's identifier, e.g. "apache-2.0", "llama2", or "other"; None where no card states one.
        license_name, license_link: what a card with "other" says besides.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    files: tuple[str, ...] = ()


def terms_of(folder: Path, companions: Sequence[Path]) -> Terms:
    """The terms of a model folder: of its base where it was made from one, else its own.

    Args:
        companions: its companion files, relative to the folder.
    """
    files = tuple(path.name for path in companions if path.name.lower().startswith(TERMS))
    card = next((folder / name for name in (BASE_CARD_NAME, CARD_NAME) if (folder / name).is_file()), None)
    if card is None:
        return Terms(files=files)
    stated = _front_matter(card.read_text(encoding="utf-8", errors="replace"))
    if stated is None:
        console.warning(f"the first lines of {card} are not valid YAML, so the licence of the base is not known")
        return Terms(files=files)
    license_id, name, link = (stated.get(key) for key in ("license", "license_name", "license_link"))
    if isinstance(license_id, list):
        license_id = license_id[0] if len(license_id) == 1 else None
    return Terms(_text(license_id), _text(name), _text(link), files)


def _front_matter(card: str) -> Mapping[str, Any] | None:
    """What stands between the two first lines of dashes; nothing where they are missing, None if it can't be read."""
    found = _FRONT_MATTER.match(card)
    values = parse_scalar(found[1]) if found else {}
    return values if isinstance(values, dict) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
