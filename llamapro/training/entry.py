"""The training programs' command line: `launch/pretrain.py` and `launch/sft.py` call `main`.

In this order: configuration, facts, packs, process group, session, loop. Everything that can be wrong with the
configuration is said before any process group starts, once per job and not once per rank.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from llamapro import console
from llamapro.checkpoint.discover import find_checkpoint
from llamapro.config.load import dump_config, load_config
from llamapro.config.root import RunConfig
from llamapro.engine.environment import world_size
from llamapro.errors import RetryLater, UserError
from llamapro.files.lock import RunLock
from llamapro.ranks import Ranks
from llamapro.run_folder import RunFolder
from llamapro.training.environment import describe_environment
from llamapro.training.model_facts import Stage
from llamapro.training.peers import SIGN_SECONDS, Peers, told_to_peers
from llamapro.training.preflight import Facts, check_facts, show_plan
from llamapro.training.progress import Progress
from llamapro.training.signals import StopRequest, watch_signals
from llamapro.training.sources import resolved_steps, write_packs


def main(stage: Stage, argv: Sequence[str] | None = None) -> int:
    """Run one rank of a training job; returns its exit code."""
    own, overrides = _parser(stage).parse_known_args(list(sys.argv[1:] if argv is None else argv))
    return console.guarded(lambda: _run(stage, own, overrides), debug=own.debug)


def command_line() -> str:
    """This process's command as a shell line, without what the launcher adds."""
    words = [sys.executable, *(word for word in sys.argv if not word.startswith("--local_rank"))]
    return shlex.join(words)


def _parser(stage: Stage) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"launch/{stage}.py",
        usage=f"deepspeed [--hostfile H] [--num_gpus N] launch/{stage}.py --config RUN.yaml [--section.field value …]",
        add_help=False,  # --help needs the file's values, see load_config
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show the plan, take one step on random tokens, write nothing",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None)  # injected by launchers
    return parser


def _run(stage: Stage, own: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = load_config(own.config, overrides)
    facts = check_facts(config, stage, world_size())
    for sentence in facts.warnings:
        console.warning(sentence)
    if own.dry_run:
        return _dry_run(config, facts, own.local_rank)
    return _start(config, facts, own.local_rank)


def _dry_run(config: RunConfig, facts: Facts, local_rank: int | None) -> int:
    from llamapro.training.mock_step import try_step

    show_plan(config, facts)
    try_step(config, facts, local_rank)
    return 0


def _start(config: RunConfig, facts: Facts, local_rank: int | None) -> int:
    """Join the job and train. Rank 0 prepares what all ranks will read before they meet."""
    from llamapro.engine.start import start_ranks, stop_ranks

    folder = RunFolder(config.run.folder)
    with ExitStack() as stack:
        lock = _prepare(config, facts, folder, stack) if console.process_rank() == 0 else None
        ranks = start_ranks(config.engine, local_rank)
        stack.callback(stop_ranks)
        step_seconds = 60 * config.engine.step_timeout_minutes
        peers = Peers.meet(folder, ranks, min(SIGN_SECONDS, step_seconds / 10))
        stop = stack.enter_context(
            watch_signals(
                grace_seconds=config.run.grace_seconds,
                step_timeout_seconds=step_seconds,
                stop_file=folder.stop_file if ranks.rank == 0 else None,
                peers=peers,
            )
        )
        with told_to_peers(peers):
            return _train(config, facts, folder, ranks, stop, lock)


def _prepare(config: RunConfig, facts: Facts, folder: RunFolder, stack: ExitStack) -> RunLock:
    """Take the run folder for this job and write the pack plans that are missing."""
    folder.create()
    lock = RunLock(folder.path, job_id=os.environ.get("SLURM_JOB_ID"))
    try:
        stack.enter_context(lock)
    except UserError as error:
        # The owner may be a node that died minutes ago: a requeued job gets the folder once the lease is stale.
        raise RetryLater(str(error)) from error
    write_packs(config, facts, folder)
    return lock


def _finished(progress: Progress, steps: int, facts: Facts) -> bool:
    """Whether nothing is left to do: no step, and not the validation after the last one."""
    return progress.step >= steps and (progress.validated == progress.step or not facts.validation_sets)


def _train(
    config: RunConfig, facts: Facts, folder: RunFolder, ranks: Ranks, stop: StopRequest, lock: RunLock | None
) -> int:
    from llamapro.training.loop import train
    from llamapro.training.opening import open_session
    from llamapro.training.trainer_state import saved_state

    checkpoint = find_checkpoint(folder.checkpoints, ranks)
    saved = saved_state(checkpoint)
    if saved is not None and _finished(saved.progress, resolved_steps(config, facts, folder), facts):
        console.info(f"{folder.path} is finished already: its last step, {saved.progress.step}, is saved")
        return 0
    session, progress = open_session(config, facts, folder, ranks, stop, lock, checkpoint)
    if ranks.rank == 0:
        folder.prepare(dump_config(config), command_line(), describe_environment(ranks))
    try:
        progress = train(session, progress)
    finally:
        session.metrics.close()
    console.info(f"finished: {progress.step:,} steps, {progress.tokens:,} target tokens")
    console.info(f"next: llamapro export {folder.path} OUT")
    return 0
