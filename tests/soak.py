"""Short runs under random faults, each until it is finished: all must end where the undisturbed run ends, bit for bit.

    make soak [MINUTES=60] [SEED=1]            or python -m tests.soak --minutes 60 --seed 1

Two real ranks train a tiny model. Faults: a rank or all are killed, asked to stop, frozen; the disk is full for one
rank; a bit of a checkpoint is flipped between two starts; and in half of the runs one rank's loss is not a number in
one step, which is the text's fault and therefore the undisturbed run's as well. The first failure ends it and says
the seed of its run; `--seed` with that one and `--runs 1` repeats the run's faults, though not their moments exactly.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import orjson

from llamapro import console
from llamapro.checkpoint.discover import list_checkpoints
from llamapro.engine.ports import free_port
from llamapro.errors import EXIT_RETRY
from llamapro.training.metrics import read_metrics
from tests.support.data import flip_bit
from tests.support.rank_process import Disturbance, run_rank
from tests.support.training import losses, prepare, settings, state_digest

RANKS = 2
STEPS = 10
NOT_A_NUMBER = Disturbance(nan_step=5, nan_rank=1)
# No launcher ends the rank that waits for one that was lost before they met.
START_TIMEOUT_SECONDS = 30
STEP_TIMEOUT_SECONDS = 12
HANG_SECONDS = 240
MOST_STARTS = 12
KINDS = ("kill one", "kill all", "ask one", "ask all", "freeze one", "full disk", "flipped bit")


class Diverged(AssertionError):
    """A run did not end as it must."""


@dataclass(frozen=True)
class Golden:
    """How the undisturbed run ended; a loss that is not a number is None."""

    digest: str
    losses: tuple[float | None, ...]
    seconds: float


class Soak:
    """Runs in a folder of their own.

    Args:
        folder: what the runs share is made here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = prepare(folder)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.support.rank_process"])
        first = self._context.Process(target=os.getpid)  # what is imported once is no part of a run's time
        first.start()
        first.join()
        self.met: Counter[str] = Counter()
        self._golden: dict[Disturbance, Golden] = {}

    def run(self, seed: int, kinds: Sequence[str] | None = None) -> None:
        """One run under faults until it is finished.

        Args:
            kinds: of the faults, one per start; None: drawn by chance.

        Raises:
            Diverged: it ended otherwise than without faults, hung or refused to go on.
        """
        chance = random.Random(seed)
        own = NOT_A_NUMBER if chance.random() < 0.5 else Disturbance()
        if kinds is None:
            kinds = chance.choices(KINDS, k=chance.randint(1, 4))
        golden = self._undisturbed(own)
        name = f"run-{seed}"
        for kind in [*kinds, *[""] * MOST_STARTS]:
            codes = self._start(name, own, kind, chance, golden.seconds)
            self.met[kind] += 1
            if any(code not in (0, EXIT_RETRY, -signal.SIGKILL, None) for code in codes):
                raise Diverged(f"seed {seed}: after {kind!r} the ranks ended with {codes}: {self._log(name)}")
            if codes == [0] * RANKS:
                break
        else:
            raise Diverged(f"seed {seed}: {MOST_STARTS} starts without a fault did not finish it: {self._log(name)}")
        self._compare(seed, name, kinds, golden)
        shutil.rmtree(self._folder / name)

    def _undisturbed(self, own: Disturbance) -> Golden:
        if own not in self._golden:
            name = f"undisturbed-{own.nan_step}"
            began = time.monotonic()
            codes = self._start(name, own, "", random.Random(0), 0.0)
            if codes != [0] * RANKS:
                raise Diverged(f"without any fault the ranks ended with {codes}: {self._log(name)}")
            run = self._folder / name
            found = tuple(losses(read_metrics(run / "metrics.jsonl")))
            self._golden[own] = Golden(state_digest(run), found, time.monotonic() - began)
        return self._golden[own]

    def _compare(self, seed: int, name: str, kinds: Sequence[str], golden: Golden) -> None:
        run = self._folder / name
        if state_digest(run) != golden.digest:
            raise Diverged(f"seed {seed}: after {list(kinds)} weights or moments are others: {self._log(name)}")
        if tuple(losses(read_metrics(run / "metrics.jsonl"))) != golden.losses:
            raise Diverged(f"seed {seed}: after {list(kinds)} the losses are others: {self._log(name)}")

    def _start(self, name: str, own: Disturbance, kind: str, chance: random.Random, seconds: float) -> list[int | None]:
        """Start the ranks, disturb them, wait for their end; their exit codes."""
        if kind == "flipped bit":
            self._flip(name, chance)
        rank = chance.randrange(RANKS)
        disturbance = own
        if kind == "full disk":
            disturbance = Disturbance(own.nan_step, own.nan_rank, full_rank=rank, full_saves=chance.randint(1, 2))
        ranks = self._launch(name, disturbance)
        try:
            if kind.startswith(("kill", "ask", "freeze")):
                time.sleep(chance.uniform(0.2, 1.0) * seconds)
                _disturb(ranks, kind, rank)
            return self._end(name, ranks, frozen=rank if kind == "freeze one" else None)
        finally:
            for process in ranks:
                process.kill()
                process.join()

    def _launch(self, name: str, disturbance: Disturbance) -> list[BaseProcess]:
        values = settings(
            self._folder,
            name,
            engine={
                "precision": "float32",
                "zero_stage": 2,
                "startup_timeout_minutes": START_TIMEOUT_SECONDS / 60,
                "step_timeout_minutes": STEP_TIMEOUT_SECONDS / 60,
            },
            schedule={"steps": STEPS},
            checkpoint={"every_steps": 2, "keep": 3},
            validation={"every_steps": 5},
        )
        values["run"]["grace_seconds"] = 10
        config = self._folder / f"{name}.yaml"
        config.write_bytes(orjson.dumps(values))
        arguments = (str(config), str(self._log(name)), RANKS, free_port(), disturbance)
        ranks = [self._context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        return list(ranks)

    def _end(self, name: str, ranks: Sequence[BaseProcess], frozen: int | None) -> list[int | None]:
        """Wait for all ranks; for one that is frozen only until the others have noticed."""
        awaited = [process for rank, process in enumerate(ranks) if rank != frozen]
        end = time.monotonic() + HANG_SECONDS
        for process in awaited:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                raise Diverged(f"a rank still runs after {HANG_SECONDS} s: {self._log(name)}")
        if frozen is not None:
            ranks[frozen].kill()
            ranks[frozen].join()
        return [process.exitcode for process in ranks]

    def _flip(self, name: str, chance: random.Random) -> None:
        """Flip a bit of the newest checkpoint, if there is another one to go back to."""
        root = self._folder / name / "checkpoints"
        whole = [listed.folder for listed in list_checkpoints(root, digests=True) if not listed.problem]
        if len(whole) > 1:
            file = chance.choice(sorted(whole[0].iterdir()))
            flip_bit(file, chance.randrange(file.stat().st_size))

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _disturb(ranks: Sequence[BaseProcess], kind: str, rank: int) -> None:
    what, _, whom = kind.partition(" ")
    number = {"kill": signal.SIGKILL, "ask": signal.SIGTERM, "freeze": signal.SIGSTOP}[what]
    for process in [ranks[rank]] if whom == "one" else ranks:
        assert process.pid is not None
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(process.pid, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak for some minutes or runs; 1 at the first failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--runs", type=int, help="at most so many runs")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first run; then one more each")
    arguments: Any = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    folder = Path(tempfile.mkdtemp(prefix="llamapro-soak-"))
    soak, seed = Soak(folder), arguments.seed
    while time.monotonic() < end and seed - arguments.seed != arguments.runs:
        try:
            soak.run(seed)
        except AssertionError as error:
            console.warning(f"FAILED: {error}\nseed {seed}; everything is kept in {folder}")
            return 1
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(soak.met.items()) if kind)
        console.info(f"seed {seed}: as the undisturbed run; so far {seed - arguments.seed + 1} runs under {faults}")
        seed += 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
