"""`llamapro slurm` writes a script that the cluster takes, or says in one message why there is none."""

import argparse
import re
import shlex
from pathlib import Path

import orjson
import pytest

from llamapro.cli import slurm
from llamapro.cli.main import main
from llamapro.cli.slurm_script import SIGNAL_SECONDS, SLURM_EARLY_SECONDS, seconds_of
from llamapro.errors import EXIT_USAGE
from tests.support.config import minimal_values
from tests.support.source import ROOT

SIZE = ["--nodes", "4", "--gpus-per-node", "8"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run's configuration, on a machine without Slurm."""
    values = minimal_values(run={"folder": "runs/my law"}, engine={"step_timeout_minutes": 20})
    (tmp_path / "law.yaml").write_bytes(orjson.dumps(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def cluster_that_says(folder: Path, message: str, code: int) -> None:
    """A pretended cluster: its controller answers, its sbatch keeps what it is given."""
    command(folder / "bin" / "scontrol", "exit 0")
    kept = f'echo "$*" > {folder}/options; /bin/cat > {folder}/asked'
    command(folder / "bin" / "sbatch", f"{kept}; echo 'sbatch: {message}' >&2; exit {code}")


def test_the_script_asks_for_what_was_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--partition", "gpu", "--account", "law", "--time", "2-12", "--cpus-per-task", "12"]
    assert main(["slurm", "law.yaml", *SIZE, "--stage", "sft", *more, "--sbatch=--qos=high", "--sbatch=--mem=0"]) == 0
    out, err = capsys.readouterr()
    assert out == "law.sbatch: 32 tasks; submit it: sbatch law.sbatch\n" and "no sbatch on this machine" in err
    lines = (folder / "law.sbatch").read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"} <= options
    assert {"--partition=gpu", "--account=law", "--time=2-12", "--qos=high", "--mem=0"} <= options
    assert {"--job-name=my-law", f"--chdir={folder}", "--requeue"} <= options
    assert "config=law.yaml" in lines
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--wait=1380 " in srun
    assert not [line for line in lines if len(line) > 120 and not line.startswith("#SBATCH")]


def test_the_cluster_is_asked_and_its_answer_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster_that_says(folder, "Job 5 to start at noon", 0)
    assert main(["slurm", "law.yaml", *SIZE, "--output", "there.sbatch"]) == 0
    assert "the cluster would take it: Job 5 to start at noon" in capsys.readouterr().err
    assert (folder / "options").read_text() == "--test-only\n"
    assert (folder / "asked").read_text() == (folder / "there.sbatch").read_text()


def test_what_the_cluster_refuses_is_not_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster_that_says(folder, "error: invalid partition specified: nowhere", 1)
    assert main(["slurm", "law.yaml", *SIZE, "--partition", "nowhere"]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert message.count("error:") == 2 and "invalid partition specified: nowhere" in message
    assert not (folder / "law.sbatch").exists()


def test_a_controller_that_does_not_answer_is_told_and_stops_nobody(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster_that_says(folder, "error: nobody there", 1)
    command(folder / "bin" / "scontrol", "echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    assert main(["slurm", "law.yaml", *SIZE]) == 0
    assert "no controller answers (Slurmctld(primary) at head is DOWN)" in capsys.readouterr().err
    assert (folder / "law.sbatch").is_file() and not (folder / "asked").exists()


def test_a_script_is_replaced_on_request_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "law.sbatch").write_text("mine\n")
    assert main(["slurm", "law.yaml", *SIZE]) == EXIT_USAGE
    assert "law.sbatch exists" in capsys.readouterr().err
    assert (folder / "law.sbatch").read_text() == "mine\n"
    assert main(["slurm", "law.yaml", *SIZE, "--overwrite"]) == 0
    assert "#SBATCH" in (folder / "law.sbatch").read_text()


def test_a_wrong_configuration_is_told_now(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = minimal_values(schedule={"step": 3}, batch={"global_sequences": 0})
    (folder / "law.yaml").write_bytes(orjson.dumps(values))
    assert main(["slurm", "law.yaml", *SIZE]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert "law.yaml: 2 problems" in message and "did you mean" in message
    assert not (folder / "law.sbatch").exists()


def test_wrong_options_are_told_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--nodes", "0", "--gpus-per-node", "-1", "--cpus-per-task", "0", "--signal-seconds", "0"]
    assert main(["slurm", "law.yaml", *wrong, "--time", "soon", "--sbatch=qos high", "--mount", "/data"]) == EXIT_USAGE
    message = capsys.readouterr().err
    for part in ("--nodes 0", "--gpus-per-node -1", "--cpus-per-task 0", "--signal-seconds 0", "--time soon"):
        assert part in message
    assert "--sbatch 'qos high'" in message and "--mount goes with --container" in message
    assert message.count("error:") == 1


@pytest.mark.parametrize("value", ["a\nb", ""])
@pytest.mark.parametrize("option", ["--partition", "--account"])
def test_a_value_that_would_be_another_line_is_refused(
    option: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", "law.yaml", *SIZE, option, value]) == EXIT_USAGE
    assert option in capsys.readouterr().err and not (folder / "law.sbatch").exists()


def test_a_limit_within_which_the_signal_always_comes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    minutes = (SIGNAL_SECONDS + SLURM_EARLY_SECONDS) // 60
    assert main(["slurm", "law.yaml", *SIZE, "--time", str(minutes)]) == EXIT_USAGE
    assert "the run would never begin" in capsys.readouterr().err
    assert main(["slurm", "law.yaml", *SIZE, "--time", str(minutes + 1)]) == 0


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90 * 60),
        ("1:30", 90),
        ("2:00:30", 7230),
        ("2-00", 2 * 86400),
        ("1-2:03", 93780),
        ("1-2:3:4", 93784),
        ("", None),
        ("1-", None),
        ("1:2:3:4", None),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_does(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


def test_the_page_has_every_option_and_its_commands_work(folder: Path) -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    parser = argparse.ArgumentParser(exit_on_error=False)
    slurm.add_arguments(parser)
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    assert [option for option in options if option != "--help" and f"`{option}" not in page] == []
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    rendered = [shlex.split(command)[1:] for command in commands if command.startswith("llamapro slurm")]
    assert len(rendered) == 3 and all(main(words) == 0 for words in rendered)
    submitted = [word for command in commands if command.startswith("sbatch") for word in command.split()]
    for script in (word for word in submitted if word.endswith(".sbatch")):
        assert (folder / script).is_file() or (ROOT / script).is_file(), script
