"""What every section shares: frozen, closed to unknown keys, strict about types, documented field by field."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    """One part of the run configuration. A field's docstring is its help text, its page in the docs and its unit."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Join the lines of each field's docstring: they are wrapped again wherever they are shown."""
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())


Count = Annotated[int, Field(gt=0)]
"""A whole number of things, at least 1."""

Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A share of something, from 0 to 1."""

FilePath = Annotated[Path, Strict(False)]
"""A path, relative to the working directory unless absolute."""

Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")]
"""A short name that can stand in a metric's name and in a command line."""
