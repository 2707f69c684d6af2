"""Typed errors. The exit code of each answers one question: retry?

0 done; 1 a check failed or a guard stopped the run: do not retry unchanged; 2 usage, configuration or refused
model; 75 retry: saved on request, or a peer was lost.
"""

from collections.abc import Sequence

EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_RETRY = 75


class LlamaproError(Exception):
    """Base of every error raised on purpose: its text is one message for the user, complete without a traceback."""

    exit_code: int = EXIT_CHECK_FAILED


class UserError(LlamaproError, ValueError):
    """Something the user gave can't be used: the message has the value, where it came from and what to do."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """Every problem of a configuration at once.

    Attributes:
        problems: one complete sentence each, beginning with the dotted key it is about.
    """

    def __init__(self, problems: Sequence[str], source: str = "configuration") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class ModelRefused(UserError):
    """A model that can't be expanded or trained correctly, with the reason and the way out."""


class DataError(UserError):
    """Input text, shards or packs that can't be used: names the file and the place in it."""


class CheckFailed(LlamaproError):
    """A verification found a difference, or a guard stopped the run: names the first tensor, file or step."""


class Corrupted(CheckFailed):
    """Stored bytes differ from their recorded size or digest: names the file."""


class RetryLater(LlamaproError):
    """The work was saved on request, or a peer was lost: starting the same command again continues it."""

    exit_code = EXIT_RETRY


class PeerLost(RetryLater):
    """Another rank is gone, or did not come to a collective in time: names it, and what is known of it."""
