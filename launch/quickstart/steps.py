"""Steps that are done once: what is finished and unchanged is skipped, so a stopped quickstart continues.

A step's inputs are plain values plus the stamps of the steps before it. They are written down before it starts and
again when it is done: other inputs than those that its outputs were begun with throw the outputs away.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from llamapro import console
from llamapro.files.atomic import discard, write_atomic


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: a short name, also of its stamp files; unique in a plan.
        stamps: folder of its stamp files.
        title: what the reader is told.
        outputs: files and folders that exist when it is done.
        inputs: what the outputs depend on, apart from the steps named in `after`.
        work: does it; must leave each output whole or absent, or be able to continue it.
        after: names of earlier steps whose outputs it reads.
    """

    name: str
    stamps: Path
    title: str
    outputs: tuple[Path, ...]
    inputs: tuple[str, ...]
    work: Callable[[], None]
    after: tuple[str, ...] = field(default=())


def run_steps(steps: Sequence[Step]) -> None:
    """Run what is not done yet, in order."""
    digests: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        digests[step.name] = digest = _digest(step, digests)
        head = f"[{number}/{len(steps)}] {step.title}"
        begun, done = (step.stamps / f"{step.name}.{moment}" for moment in ("begun", "done"))
        if _text(done) == digest and all(output.exists() for output in step.outputs):
            console.info(f"{head}: done before")
            continue
        console.info(head)
        if _text(begun) != digest:
            discard(*step.outputs)
        step.stamps.mkdir(parents=True, exist_ok=True)
        write_atomic(begun, digest)
        start = time.monotonic()
        step.work()
        write_atomic(done, digest)
        console.info(f"[{number}/{len(steps)}] done in {time.monotonic() - start:.0f} s")


def _digest(step: Step, earlier: dict[str, str]) -> str:
    material = [step.name, *step.inputs, *(earlier[name] for name in step.after)]
    return hashlib.sha256(orjson.dumps(material)).hexdigest()


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
