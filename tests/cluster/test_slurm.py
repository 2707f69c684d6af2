"""A run on a real Slurm: two nodes, preempted, timed out, cancelled, a node lost; always the same result."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.errors import EXIT_USAGE
from llamapro.run_folder import RunFolder
from llamapro.training.metrics import read_metrics
from tests.support.data import build, random_texts, save_tokenizer, shard_bytes, write_jsonl
from tests.support.slurm import NODES, Slurm, running_slurm, wait_until, why_not
from tests.support.source import ROOT
from tests.support.training import prepare, settings, state_digest

pytestmark = pytest.mark.cluster

ENDS = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"}
STEPS = 120
SAVED_EVERY = 30
SIZE = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with running_slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data that all runs share."""
    return prepare(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def on_the_cluster(slurm: Slurm, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of a user of the cluster, in the shared folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])


class Job:
    """A submitted run."""

    def __init__(
        self, slurm: Slurm, place: Path, name: str, *options: str, steps: int = STEPS, saved_every: int = SAVED_EVERY
    ) -> None:
        values = settings(
            place,
            name,
            engine={"zero_stage": 3, "precision": "float32", "step_timeout_minutes": 2},
            schedule={"steps": steps, "learning_rate": 1e-2},
            validation={"every_steps": steps},
            checkpoint={"every_steps": saved_every},
        )
        (place / f"{name}.yaml").write_bytes(orjson.dumps(values))
        assert main(["slurm", f"{name}.yaml", *SIZE, *options]) == 0
        self.slurm = slurm
        self.last_step = steps
        self.folder = RunFolder(place / name)
        self.number = slurm.submit(place / f"{name}.sbatch")
        self.log = place / f"slurm-{self.number}.log"

    @property
    def said(self) -> str:
        """The job's log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        if not self.folder.metrics_file.exists():
            return 0
        return max((line["step"] for line in read_metrics(self.folder.metrics_file) if "loss" in line), default=0)

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.steps >= step, f"step {step}")
        assert self.steps < self.last_step - SAVED_EVERY, "the test came too late to disturb anything"

    def wait_for_state(self, state: str) -> None:
        self.wait(lambda: self.state == state, state)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that only a job can bring which has not ended."""
        what = f"job {self.number}: {what}"
        wait_until(lambda: condition() or self._has_ended(), what, 900, self.story)
        assert condition(), f"it ended without {what}\n{self.story()}"

    def _has_ended(self) -> bool:
        """Whether it will not be put back in the queue: the states on the way there last a moment."""
        if self.state in ENDS:
            time.sleep(3)
        return self.state in ENDS

    def resumed_from(self) -> list[int]:
        """The steps from which the run was continued."""
        lines = read_metrics(self.folder.metrics_file)
        return [line["step"] for line in lines if line.get("event") == "resume"]

    def story(self) -> str:
        return f"{self.said}\n{self.slurm.job(self.number)}\n{self.slurm.story()}"


@pytest.fixture
def start(slurm: Slurm, place: Path, on_the_cluster: None) -> Iterator[Callable[..., Job]]:
    """Submit runs; what is left of them is cancelled at the end."""
    jobs: list[Job] = []

    def submit(name: str, *options: str, **settings: int) -> Job:
        jobs.append(Job(slurm, place, name, *options, **settings))
        return jobs[-1]

    yield submit
    for job in jobs:
        slurm.run("scancel", job.number)
        job.wait(lambda job=job: job.state in ENDS, "the end")


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, place: Path) -> str:
    """Digest of what a run learns when nothing happens to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        job = Job(slurm, place, "calm")
    job.wait_for_state("COMPLETED")
    assert "2 ranks around tcp://n1:" in job.said, job.said
    assert slurm.job(job.number)["NodeList"] == "n[1-2]" and job.restarts == 0
    return state_digest(job.folder.path)


def test_a_preempted_run_queues_again_and_finishes_as_if_nothing_had_happened(
    start: Callable[..., Job], slurm: Slurm, undisturbed: str, tmp_path: Path
) -> None:
    job = start("preempted", saved_every=STEPS)
    job.wait_for_step(3)
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsrun sleep 3\n")
    urgent = slurm.submit(tmp_path / "urgent.sh", "--partition=high", "--nodes=2", "--exclusive", "--ntasks-per-node=1")
    slurm.wait_for_job(urgent, "COMPLETED")
    job.wait_for_state("COMPLETED")
    assert job.restarts == 1, job.story()
    assert "back to the queue, restart 1" in job.said
    (step,) = job.resumed_from()
    assert 3 <= step < STEPS, "what was saved at the signal"
    assert state_digest(job.folder.path) == undisturbed


def test_before_the_time_limit_a_run_queues_again_and_a_cancelled_one_stays_cancelled(
    start: Callable[..., Job],
) -> None:
    job = start("timed", "--time", "3", "--signal-seconds", "110", steps=100_000)
    job.wait(lambda: job.restarts == 1, "the first restart")
    assert "SIGUSR1" in job.said
    job.wait(lambda: "| loss " in job.said.rpartition("back to the queue")[2], "it trains again")
    restarts = job.restarts
    assert job.slurm.run("scancel", job.number).returncode == 0
    job.wait_for_state("CANCELLED")
    said = job.said
    with pytest.raises(AssertionError, match="in vain"):
        wait_until(lambda: job.state != "CANCELLED", "it comes back", 15)
    assert (job.restarts, job.said) == (restarts, said)


def test_a_run_whose_node_dies_is_continued_when_there_is_one_again(
    start: Callable[..., Job], slurm: Slurm, undisturbed: str
) -> None:
    job = start("orphaned")
    job.wait_for_step(SAVED_EVERY + 3)
    slurm.kill_node(NODES[1])
    slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    job.wait(lambda: job.state != "RUNNING", "the loss is noticed")
    slurm.start_node(NODES[1])
    slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    job.wait_for_state("COMPLETED")
    assert job.restarts == 1
    assert job.resumed_from()[0] % SAVED_EVERY == 0
    assert state_digest(job.folder.path) == undisturbed


def test_llamapro_stop_ends_the_job_for_good(start: Callable[..., Job]) -> None:
    job = start("stopped", steps=100_000)
    job.wait_for_step(3)
    assert main(["stop", str(job.folder.path)]) == 0
    job.wait_for_state("FAILED")
    assert job.restarts == 0 and "asked the run to stop" in job.said


def test_tokenizing_over_two_nodes_gives_the_bytes_of_one_process(slurm: Slurm, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")
    for number in range(4):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", random_texts(40, seed=number))
    build([tmp_path / "in"], tmp_path / "model", tmp_path / "alone", heldout=0.1)
    paths = {"--input": "in", "--tokenizer": "model", "--output": "together"}
    words = [word for option, name in paths.items() for word in (option, str(tmp_path / name))]
    options = [f"--chdir={ROOT}", f"--output={tmp_path}/log", "--cpus-per-task=1"]
    number = slurm.submit(ROOT / "launch" / "slurm" / "data.sbatch", *options, words=[*words, "--heldout", "0.1"])
    wait_until(lambda: slurm.job(number)["JobState"] in ("COMPLETED", "FAILED"), "the end", 300, slurm.story)
    assert slurm.job(number)["JobState"] == "COMPLETED", f"{(tmp_path / 'log').read_text()}\n{slurm.story()}"
    assert slurm.job(number)["NodeList"] == "n[1-2]"
    assert shard_bytes(tmp_path / "together") == shard_bytes(tmp_path / "alone")


@pytest.mark.parametrize(
    "options",
    [
        ["--nodes", "2", "--gpus-per-node", "8"],
        [*SIZE, "--stage", "sft", "--partition", "high", "--account", "law", "--time", "1-12", "--sbatch=--exclusive"],
        [*("--nodes", "1", "--gpus-per-node", "4", "--cpus-per-task", "2"), "--container", "images/llamapro.sif"],
    ],
)
def test_the_controller_takes_what_is_rendered(
    options: list[str], on_the_cluster: None, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "any.yaml").write_bytes(orjson.dumps(settings(place)))
    assert main(["slurm", "any.yaml", *options, "--overwrite"]) == 0
    assert "the cluster would take it: Job " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([*SIZE, "--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--nodes", "3", "--gpus-per-node", "8"], "allocation failure"),
        (["--nodes", "2", "--gpus-per-node", "9"], "allocation failure"),
        ([*SIZE, "--partition", "high", "--time", "3-00"], "time limit"),
    ],
)
def test_what_the_controller_refuses_is_said_and_not_written(
    options: list[str], reason: str, on_the_cluster: None, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "none.yaml").write_bytes(orjson.dumps(settings(place)))
    assert main(["slurm", "none.yaml", *options]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert "the cluster refuses the script" in message and reason in message
    assert not (place / "none.sbatch").exists()


def test_nothing_is_left_behind() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with running_slurm() as cluster:
        folder = cluster.folder
    assert not folder.exists()
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(folder).encode() in _bytes(path)]
    assert left == []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        assert error.errno is not None and os.strerror(error.errno)
        return b""
