"""Settings that the schema knows and this version does not act on: refused, never silently ignored.

One row per setting. Making a setting work means removing its row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from llamapro.config.root import RunConfig


@dataclass(frozen=True)
class Unavailable:
    """A setting with values that this version can't honour.

    Attributes:
        key: dotted key.
        refused: whether a value can't be honoured.
        instead: what to write.
    """

    key: str
    refused: Callable[[Any], bool]
    instead: str


def unavailable_settings(config: RunConfig) -> list[str]:
    """One sentence per setting whose value this version can't honour."""
    problems = []
    for row in UNAVAILABLE:
        value = setting(config, row.key)
        if row.refused(value):
            problems.append(f"{row.key}: {_shown(value)} is not available in this version; {row.instead}")
    return problems


def setting(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return repr(value) if isinstance(value, str) else str(value)


UNAVAILABLE: Final = (
    Unavailable("engine.offload", _among("optimizer"), "use none; zero_stage 2 and 3 split the optimizer over ranks"),
    Unavailable("logging.trackers", lambda names: not set(names) <= {"tensorboard"}, "use [tensorboard] or []"),
)
