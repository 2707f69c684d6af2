"""Faults with which DeepSpeed's universal checkpoints and others' resumes change training without a word.

Each is made again on purpose in the resume of a real run, which then is not, bit for bit, the run that was not stopped;
without the fault it is. Where we refuse before anything is trained, that is shown too.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from llamapro.config.schedule import ScheduleConfig
from llamapro.data.loader import SampleStream
from llamapro.engine.engine import Engine
from llamapro.expansion.expand import expand
from llamapro.training import loop, opening, resume
from llamapro.training.guards import SpikeGuard
from llamapro.training.progress import Progress
from llamapro.training.schedule import learning_rate
from llamapro.training.session import Session
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerError, WorkerPool
from tests.support.resumes import Outcome, outcome, require_same, stop
from tests.support.training import losses, prepare, settings

STOP = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def straight(folder: Path, pool: WorkerPool) -> Outcome:
    return outcome(pool, run_settings(folder, "straight"), 1)


@pytest.fixture(scope="module")
def stopped(folder: Path, pool: WorkerPool) -> Path:
    """A run that was stopped after step 4, to be copied."""
    stop(pool, run_settings(folder, "stopped"), 1, STOP)
    return folder / "stopped"


def run_settings(folder: Path, run: str, **sections: Any) -> dict[str, Any]:
    """Weight decay strong enough that norms which must not decay show it."""
    return settings(folder, run, optimizer={"weight_decay": 0.5}, validation={"every_steps": 100}, **sections)


def resumed(
    pool: WorkerPool,
    folder: Path,
    stopped: Path,
    run: str,
    fault: Callable[[], AbstractContextManager[None]] | None = None,
    **sections: Any,
) -> Outcome:
    shutil.copytree(stopped, folder / run)
    return outcome(pool, run_settings(folder, run, **sections), 1, fault)


@contextmanager
def after_loading(change: Callable[[Engine], None]) -> Iterator[None]:
    """Change an engine each time after it has loaded a checkpoint."""
    load = Engine.load

    def load_and_change(engine: Engine, *arguments: Any) -> None:
        load(engine, *arguments)
        change(engine)

    with patch.object(Engine, "load", load_and_change):
        yield


def hyperparameters_of_the_first_group() -> AbstractContextManager[None]:
    """3.2.1: (decay 0.1, lr 1e-2) and (0.0, 3e-3) became (0.1, 1e-2) twice: norms begin to decay."""

    def change(engine: Engine) -> None:
        first, *others = engine._optimizer.param_groups
        for group in others:
            group.update({key: value for key, value in first.items() if key != "params"})

    return after_loading(change)


def one_step_counter_for_all() -> AbstractContextManager[None]:
    """3.2.2: torch counts in place, so a shared counter advances once per partition: 5 became 7 after one step."""

    def change(engine: Engine) -> None:
        states = list(engine._optimizer.state.values())
        assert len(states) > 1, "one partition alone would not show it"
        for state in states:
            state["step"] = states[0]["step"]

    return after_loading(change)


def step_counter_from_zero() -> AbstractContextManager[None]:
    """3.3: the optimizer's step is lost, so the moments' bias is corrected as at the start."""

    def change(engine: Engine) -> None:
        engine._optimizer.steps = 0

    return after_loading(change)


def moments_from_zero() -> AbstractContextManager[None]:
    """3.3: weights only."""

    def change(engine: Engine) -> None:
        for state in engine._optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    return after_loading(change)


def weights_not_copied_down() -> AbstractContextManager[None]:
    """Masters are restored and the weights that compute are those of the start."""
    return patch("llamapro.engine.state.NamedState._refresh_low_precision", lambda _: None)  # type: ignore[return-value]


def buffers_in_another_dtype() -> AbstractContextManager[None]:
    """3.2.4: buffers are not restored: here the rotary frequencies pass through bf16 on their way."""

    def change(engine: Engine) -> None:
        for name, buffer in engine.model.hf.named_buffers():
            if "inv_freq" in name:
                buffer.copy_(buffer.bfloat16().float())

    return after_loading(change)


@contextmanager
def schedule_from_the_start() -> Iterator[None]:
    """3.3: the learning-rate schedule is not restored."""

    def restarted(step: int, steps: int, schedule: ScheduleConfig) -> float:
        return learning_rate(step - STOP, steps, schedule)

    with patch.object(loop, "learning_rate", restarted):
        yield


@contextmanager
def data_from_the_start() -> Iterator[None]:
    """3.3, 3.1.10: the loader's position is not restored."""
    planned = loop.planned_work

    def from_the_start(session: Session, progress: Progress) -> Any:
        return planned(session, replace(progress, sequences=0))

    with patch.object(loop, "planned_work", from_the_start):
        yield


@contextmanager
def another_order() -> Iterator[None]:
    """3.3: the shuffled order is rebuilt wrongly."""
    make = SampleStream.__init__

    def reseeded(stream: SampleStream, *arguments: Any, seed: int, **more: Any) -> None:
        make(stream, *arguments, seed=seed + 1, **more)

    with patch.object(SampleStream, "__init__", reseeded):
        yield


@contextmanager
def guard_without_history() -> Iterator[None]:
    """The history is part of what decides: a spike soon after a resume would pass."""
    with patch.object(SpikeGuard, "restore", lambda *_: None):
        yield


SILENT = [
    hyperparameters_of_the_first_group,
    one_step_counter_for_all,
    step_counter_from_zero,
    moments_from_zero,
    weights_not_copied_down,
    buffers_in_another_dtype,
    schedule_from_the_start,
    data_from_the_start,
    another_order,
]


def test_without_a_fault_the_resumed_run_is_the_one_that_was_not_stopped(
    folder: Path, pool: WorkerPool, straight: Outcome, stopped: Path
) -> None:
    require_same(resumed(pool, folder, stopped, "faultless"), straight, STOP + 1)


@pytest.mark.parametrize("fault", SILENT, ids=lambda fault: fault.__name__)
def test_a_fault_that_changes_training_without_a_word_is_noticed(
    folder: Path, pool: WorkerPool, straight: Outcome, stopped: Path, fault: Any
) -> None:
    found = resumed(pool, folder, stopped, fault.__name__, fault)
    with pytest.raises(AssertionError):
        require_same(found, straight, STOP + 1)
    # It is no small matter either: beyond what another world size may change.
    assert losses(found.numbers)[STOP:] != pytest.approx(losses(straight.numbers)[STOP:], rel=1e-6)


def spike_after_resume() -> AbstractContextManager[None]:
    """Every loss is multiplied from the first step on: a spike for a guard that remembers the steps before."""
    from llamapro.modeling.model import LossOutput

    forward = Engine.forward_loss

    def larger(engine: Engine, *inputs: Any) -> LossOutput:
        out = forward(engine, *inputs)
        return LossOutput(out.loss_sum * 50, out.row_loss_sums * 50, out.row_tokens) if torch.is_grad_enabled() else out

    return patch.object(Engine, "forward_loss", larger)  # type: ignore[return-value]


@contextmanager
def spike_after_resume_without_history() -> Iterator[None]:
    with spike_after_resume(), guard_without_history():
        yield


def test_a_guard_that_forgets_lets_a_spike_pass(folder: Path, pool: WorkerPool, stopped: Path) -> None:
    first_skips = []
    rules = {"spike_window_steps": 4, "spike_sigma": 6.0}
    for fault in (spike_after_resume, spike_after_resume_without_history):
        run = f"guard-{fault.__name__}"
        found = resumed(pool, folder, stopped, run, fault, guards=rules)
        first_skips.append(found.optimizer_steps)
    assert first_skips[0] < first_skips[1], "the one that remembers skips"


# 3.2.3 and 3.1.9: frozen parameters are not restored; started from a different base, 5 of 5 stayed wrong


def exchange_base(folder: Path, target: Path) -> dict[str, Any]:
    """The same architecture around other weights, expanded in the same way."""
    save_tiny_llama(target / "other-base", blocks=4, seed=99)
    expand(str(target / "other-base"), target / "other", new_blocks=2)
    return {"path": str(target / "other")}


def test_a_wrong_base_is_refused_and_would_train_without_a_word(
    folder: Path, pool: WorkerPool, straight: Outcome, stopped: Path, tmp_path: Path
) -> None:
    model = exchange_base(folder, tmp_path)
    with pytest.raises(WorkerError, match=r"ConfigError: this run can't be resumed.*\n.*model\.path: the model's weig"):
        resumed(pool, folder, stopped, "wrong-base", model=model)
    found = resumed(pool, folder, stopped, "wrong-base-unchecked", no_fixed_facts, model=model)
    assert len(losses(found.numbers)) == 8, "nothing else stops it"
    with pytest.raises(AssertionError):
        require_same(found, straight, STOP + 1)


@contextmanager
def no_fixed_facts() -> Iterator[None]:
    with patch.object(resume, "_fixed", lambda *_: []):
        yield


def test_a_wrong_base_under_the_right_record_is_refused_by_tensor(
    folder: Path, pool: WorkerPool, straight: Outcome, stopped: Path, tmp_path: Path
) -> None:
    """The weights in the model's own folder are exchanged: the digests of all that is read are compared."""
    model = exchange_base(folder, tmp_path)
    shutil.copytree(folder / "expanded", tmp_path / "mixed")
    shutil.copy(Path(model["path"]) / "model.safetensors", tmp_path / "mixed")
    mixed = {"path": str(tmp_path / "mixed")}
    with pytest.raises(WorkerError, match=r"CheckFailed: .*model\.(embed_tokens|layers|norm)"):
        resumed(pool, folder, stopped, "mixed", model=mixed)
    with pytest.raises(WorkerError, match="CheckFailed: frozen weights changed while they were in memory: 9 of 39"):
        resumed(pool, folder, stopped, "mixed-unchecked", unchecked_reading, model=mixed)


@contextmanager
def unchecked_reading() -> Iterator[None]:
    """The model is built as if it had no record; the live proof still has it."""
    build = opening.build_model

    def without_record(*arguments: Any, **more: Any) -> Any:
        return build(*arguments, **{**more, "record": None})

    with patch.object(opening, "build_model", without_record):
        yield


# 3.3: changed arguments


CHANGES: Sequence[tuple[str, dict[str, Any]]] = (
    ("run.seed", {"run": {"seed": 8}}),
    ("schedule", {"schedule": {"learning_rate": 2e-2}}),
    ("optimizer", {"optimizer": {"betas": [0.9, 0.99]}}),
    ("schedule.steps", {"schedule": {"steps": 9}}),
    ("data.sequence_length", {"data": {"sequence_length": 32}}),
)


@pytest.mark.parametrize(("key", "changes"), CHANGES, ids=[key for key, _ in CHANGES])
def test_changed_arguments_are_refused_by_name(
    folder: Path, pool: WorkerPool, stopped: Path, key: str, changes: dict[str, dict[str, Any]]
) -> None:
    run = f"changed-{key}"
    shutil.copytree(stopped, folder / run)
    values = run_settings(folder, run)
    for section, settings_of in changes.items():
        values[section] = {**values.get(section, {}), **settings_of}
    with pytest.raises(WorkerError, match=rf"ConfigError: this run can't be resumed.*\n.*- {key}"):
        outcome(pool, values, 1)


def test_a_changed_function_of_the_model_is_refused(
    folder: Path, pool: WorkerPool, stopped: Path, tmp_path: Path
) -> None:
    """The weights are the same, what is computed with them is not: no digest of a tensor shows it."""
    shutil.copytree(folder / "expanded", tmp_path / "other-config")
    path = tmp_path / "other-config" / "config.json"
    text = path.read_text()
    assert '"rms_norm_eps": 1e-05' in text or '"rms_norm_eps": 1e-06' in text
    path.write_text(text.replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0'))
    with pytest.raises(WorkerError, match=r"ConfigError: .*\n.*model\.path: the model's config\.json changed"):
        resumed(pool, folder, stopped, "other-config", model={"path": str(path.parent)})
