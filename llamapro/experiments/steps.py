"""Steps that are done once: what is finished and unchanged is skipped, what was stopped continues.

A step's stamps say from which inputs its outputs were begun and made; other inputs throw them away. Made on demand, a
step brings what it needs and is not there; what only served a finished step may be gone.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
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
        name: unique among the steps of its stamp folder, also the name of its stamps.
        stamps: folder of its stamps.
        title: what the reader is told.
        outputs: files and folders that exist when it is done.
        inputs: JSON values that the outputs depend on, apart from the steps in `after`.
        work: makes them; must leave each output whole or absent, or be able to continue it.
        after: steps whose outputs it reads.
        scratch: what else is thrown away when it begins anew.
    """

    name: str
    stamps: Path
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


def make(step: Step) -> None:
    """Make a step, and before it what it needs and is not there."""
    if _is_done(step):
        return
    for earlier in step.after:
        make(earlier)
    console.info(f"{step.title} …")
    console.info(f"{step.title}: done in {_work(step):.0f} s")


def make_all(steps: Sequence[Step]) -> None:
    """Make all of these that are not done, in this order, and count them for the reader."""
    for number, step in enumerate(steps, 1):
        place = f"[{number}/{len(steps)}]"
        if _is_done(step):
            console.info(f"{place} {step.title}: done before")
        else:
            console.info(f"{place} {step.title}")
            console.info(f"{place} done in {_work(step):.0f} s")


def _is_done(step: Step) -> bool:
    """Whether the outputs are there and were made from these inputs."""
    return _text(_stamp(step, "done")) == step.digest and all(path.exists() for path in step.outputs)


def _work(step: Step) -> float:
    """Do it; returns the seconds it took."""
    _begin(step)
    start = time.monotonic()
    step.work()
    write_atomic(_stamp(step, "done"), step.digest)
    return time.monotonic() - start


def _begin(step: Step) -> None:
    """Go on with what was begun from the same inputs; anything else, finished or not, is begun anew."""
    begun, done = _stamp(step, "begun"), _stamp(step, "done")
    if done.exists() or _text(begun) != step.digest:
        discard(*step.outputs, *step.scratch, done)
    step.stamps.mkdir(parents=True, exist_ok=True)
    write_atomic(begun, step.digest)


def _stamp(step: Step, moment: str) -> Path:
    return step.stamps / f"{step.name}.{moment}"


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
