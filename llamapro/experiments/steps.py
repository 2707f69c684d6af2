"""Steps made on demand: what is wanted and finished is skipped, with all that it was made from.

A step's stamp says from which inputs it was made; other inputs throw its outputs away. What only served a finished
step may be gone: nothing is made again unless an unfinished step needs it.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson

from llamapro import console
from llamapro.files.atomic import discard, write_atomic


@dataclass(frozen=True)
class Step:
    """One thing to make.

    Attributes:
        name: unique in an experiment, also the name of its stamps.
        title: what the reader is told.
        outputs: files and folders that exist when it is done.
        inputs: JSON values that the outputs depend on, apart from the steps in `after`.
        work: makes them; must leave each output whole or absent, or be able to continue it.
        after: steps whose outputs it reads.
        scratch: what else is thrown away when it begins anew.
    """

    name: str
    title: str
    outputs: tuple[Path, ...]
    inputs: object
    work: Callable[[], None]
    after: tuple["Step", ...] = ()
    scratch: tuple[Path, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Stands for everything that the outputs depend on."""
        material = [self.name, self.inputs, [step.digest for step in self.after]]
        return hashlib.sha256(orjson.dumps(material, option=orjson.OPT_SORT_KEYS)).hexdigest()


class Maker:
    """Makes steps; their stamps lie in one folder."""

    def __init__(self, stamps: Path) -> None:
        self._stamps = stamps

    def is_done(self, step: Step) -> bool:
        """Whether the outputs are there and were made from these inputs."""
        return _text(self._stamp(step, "done")) == step.digest and all(path.exists() for path in step.outputs)

    def make(self, step: Step) -> None:
        """Make a step, and before it what it needs and is not there."""
        if self.is_done(step):
            return
        for earlier in step.after:
            self.make(earlier)
        console.info(f"{step.title} …")
        self._begin(step)
        start = time.monotonic()
        step.work()
        write_atomic(self._stamp(step, "done"), step.digest)
        console.info(f"{step.title}: done in {time.monotonic() - start:.0f} s")

    def _begin(self, step: Step) -> None:
        """Go on with what was begun from the same inputs; anything else, finished or not, is begun anew."""
        begun, done = self._stamp(step, "begun"), self._stamp(step, "done")
        if done.exists() or _text(begun) != step.digest:
            discard(*step.outputs, *step.scratch, done)
        self._stamps.mkdir(parents=True, exist_ok=True)
        write_atomic(begun, step.digest)

    def _stamp(self, step: Step, moment: str) -> Path:
        return self._stamps / f"{step.name}.{moment}"


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
