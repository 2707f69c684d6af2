"""What result files are made of: frozen models, the keys of kept measurements, and how a file is written."""

import hashlib
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict

from llamapro.files.atomic import write_atomic


class Stored(BaseModel):
    """A part of a result file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Key(Stored):
    """What fixes a measurement."""

    def digest(self) -> str:
        """A short name for the measurement, 24 hexadecimal digits."""
        canonical = orjson.dumps(self.model_dump(), option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(canonical).hexdigest()[:24]


def write_stored(path: Path, content: Stored) -> None:
    """Write a result file, to be read by people too."""
    write_atomic(path, orjson.dumps(content.model_dump(), option=orjson.OPT_INDENT_2) + b"\n")
