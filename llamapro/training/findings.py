"""Problems and warnings gathered while facts are checked, so that all of them can be said at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from llamapro.errors import LlamaproError

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What was found so far.

    Attributes:
        problems: why the run can't start; one sentence each, beginning with the dotted key.
        warnings: what the user should know, but may want.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, key: str, text: str) -> None:
        """Note why the run can't start."""
        self.problems.append(f"{key}: {text}")

    def warn(self, key: str, text: str) -> None:
        """Note what the user should know."""
        self.warnings.append(f"{key}: {text}")

    def attempt(self, key: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; None when it raises one of our errors, which becomes a problem of this key."""
        try:
            return work()
        except LlamaproError as error:
            self.problem(key, str(error))
            return None
