"""The batch scripts: srun's code decides whether the job goes back to the queue."""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from llamapro.cli.requeue import MOST_WITHOUT_PROGRESS, Restarts
from llamapro.cli.slurm_script import DATA_RESTARTS, Allocation, Container, committed_scripts, training_script
from tests.support.config import minimal_values
from tests.support.source import ROOT

SCRIPTS = ROOT / "launch" / "slurm"
WRITE_AGAIN = "write it again from llamapro.cli.slurm_script.committed_scripts()"
JOB = "77"


class Place:
    """A folder to submit from: a run's configuration, and commands that record their calls instead of doing them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.record = folder / "calls"
        (folder / "run.yaml").write_bytes(orjson.dumps(minimal_values(run={"folder": "run"})))
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        self.command(python, f'exec {sys.executable} "$@"')
        self.command(folder / "bin" / "scontrol", f'echo "scontrol $*" >> {self.record}')
        self.command(folder / "bin" / "srun", 'for word; do echo "$word"; done > srun-words; exit "$CODE"')

    def command(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def submit(self, script: str, code: int, *words: str, restarts: int = 0) -> int:
        """Run a script with a pretended srun that ends with `code`; returns the script's code."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CODE": str(code),
            "SLURM_JOB_ID": JOB,
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        command = ["bash", "-s", "--", *words]
        self.done = subprocess.run(
            command, input=script, env=environment, cwd=self.folder, capture_output=True, text=True
        )
        return self.done.returncode

    @property
    def requeued(self) -> int:
        """How often the job was put back."""
        calls = self.record.read_text().splitlines() if self.record.exists() else []
        assert set(calls) <= {f"scontrol requeue {JOB}"}
        return len(calls)

    @property
    def words(self) -> list[str]:
        """What srun was given."""
        return (self.folder / "srun-words").read_text().splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(params=["pretrain", "sft"])
def script(request: pytest.FixtureRequest) -> str:
    return (SCRIPTS / f"{request.param}.sbatch").read_text()


def test_the_committed_scripts_are_what_the_template_gives() -> None:
    committed = {path.name: path.read_text() for path in SCRIPTS.iterdir()}
    assert committed == committed_scripts(), WRITE_AGAIN


@pytest.mark.parametrize("name", committed_scripts())
def test_bash_takes_the_script(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / name)], capture_output=True).stderr == b""


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_done_or_failed_is_not_requeued(place: Place, script: str, code: int) -> None:
    assert place.submit(script, code, "run.yaml", "--schedule.steps", "9") == code
    assert place.requeued == 0
    assert place.words[-4:] == ["--config", "run.yaml", "--schedule.steps", "9"]


def test_saved_is_requeued(place: Place, script: str) -> None:
    assert place.submit(script, 75, "run.yaml", "--schedule.steps", "9", "--debug") == 75
    assert place.requeued == 1, place.done.stderr


def test_what_was_asked_to_stop_is_not_requeued(place: Place, script: str) -> None:
    place.run.mkdir()
    (place.run / "STOP").write_text("stop\n")
    assert place.submit(script, 75, "run.yaml") == 75
    assert place.requeued == 0
    assert "asked the run to stop" in place.done.stderr


def test_the_run_folder_of_the_command_line_counts(place: Place, script: str) -> None:
    place.run.mkdir()
    (place.run / "STOP").write_text("stop\n")
    place.submit(script, 75, "run.yaml", "--run.folder", "other")
    assert place.requeued == 1
    assert (place.folder / "other" / "restarts.json").is_file()


def test_requeueing_ends_when_nothing_moves_and_goes_on_when_it_does(place: Place) -> None:
    script = (SCRIPTS / "pretrain.sbatch").read_text()
    place.run.mkdir()
    before = Restarts(job=JOB, latest="step-00000004", count=MOST_WITHOUT_PROGRESS)
    (place.run / "restarts.json").write_text(before.model_dump_json())
    (place.run / "latest").write_text(f"{before.latest}\n")
    place.submit(script, 75, "run.yaml")
    assert place.requeued == 0
    assert "without a newer checkpoint than step-00000004" in place.done.stderr
    (place.run / "latest").write_text("step-00000008\n")
    place.submit(script, 75, "run.yaml")
    assert place.requeued == 1


def test_without_a_configuration_the_script_says_how(place: Place, script: str) -> None:
    assert place.submit(script, 75) != 0
    assert "RUN.yaml" in place.done.stderr and place.requeued == 0


def test_one_task_per_gpu_with_its_cores(place: Place) -> None:
    text = training_script("sft", Allocation(nodes=3, gpus_per_node=4, cpus_per_task=6), config=Path("run.yaml"))
    for option in ("nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6"):
        assert f"#SBATCH --{option}\n" in text
    place.submit(text, 0, "--schedule.steps", "9")
    assert "--cpus-per-task=8" in place.words  # as Slurm says inside the job
    assert place.words[-8:] == [
        *(".venv/bin/python", "-P", "-m", "llamapro.launch.sft"),
        *("--config", "run.yaml", "--schedule.steps", "9"),
    ]


def test_srun_waits_longer_than_a_rank_for_its_peers() -> None:
    text = training_script("pretrain", Allocation(), config=Path("run.yaml"), step_timeout_minutes=60)
    assert "--wait=3780 " in text


def test_words_with_spaces_stay_whole(place: Place) -> None:
    container = Container("registry/image:1", ["/my data"])
    text = training_script("pretrain", Allocation(), config=Path("my run.yaml"), container=container)
    place.submit(text, 0)
    assert place.words[-2:] == ["--config", "my run.yaml"]
    assert f"--container-mounts={place.folder}:{place.folder},/my data:/my data" in place.words


def test_pyxis_starts_the_tasks_and_the_question_in_the_image(place: Place) -> None:
    text = training_script("pretrain", Allocation(), config=Path("run.yaml"), container=Container("registry/image:1"))
    place.submit(text, 0)
    assert "--container-image=registry/image:1" in place.words and "python" in place.words
    answers = f'for word; do echo "$word"; done > srun-words; [[ "$*" != *requeue* ]] && exit 75; {sys.executable} '
    place.command(place.folder / "bin" / "srun", answers + '-m llamapro requeue "${@: -1}"')
    assert place.submit(text, 75) == 75
    assert place.requeued == 1
    assert "--container-image=registry/image:1" in place.words and "--nodes=1" in place.words


def test_apptainer_is_started_by_each_task_and_once_for_the_question(place: Place) -> None:
    container = Container("/images/llamapro.sif", ["/data"])
    text = training_script("pretrain", Allocation(), config=Path("run.yaml"), container=container)
    inside = f'echo "$*" >> {place.folder}/inside; while [[ $1 != python ]]; do shift; done; shift'
    place.command(place.folder / "bin" / "apptainer", f'{inside}; exec {sys.executable} "$@"')
    place.submit(text, 75)
    assert place.requeued == 1
    start = (
        f"exec --nv --bind {place.folder} --pwd {place.folder} --bind /data /images/llamapro.sif python -P -m llamapro"
    )
    assert (place.folder / "inside").read_text() == f"{start} requeue run.yaml\n"
    assert " ".join(place.words).endswith(f"apptainer {start}.launch.pretrain --config run.yaml")


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, 0), (2, 0, 0), (137, 0, 0), (75, 0, 1), (143, 3, 1)])
def test_tokenizing_goes_on_where_it_was_ended(place: Place, code: int, restarts: int, requeued: int) -> None:
    script = (SCRIPTS / "data.sbatch").read_text()
    assert place.submit(script, code, "--input", "law/", restarts=restarts) == code
    assert place.requeued == requeued
    assert place.words[-4:] == ["--workers", "8", "--input", "law/"]


def test_tokenizing_is_not_requeued_for_ever(place: Place) -> None:
    script = (SCRIPTS / "data.sbatch").read_text()
    place.submit(script, 143, restarts=DATA_RESTARTS)
    assert place.requeued == 0
