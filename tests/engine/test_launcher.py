"""Starting ranks on several hosts: what their command lines and the log hold, how it stops, how it refuses.

`pdsh` and `ssh` are pretended here: they write down what they are told. Real hosts are in tests/cluster.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamapro.engine.launcher import is_secret, launch_on_hosts, secret_values
from llamapro.errors import UserError
from tests.support.source import ROOT

CANARY = "canary-77c1e0b4f2"
LISTED_CANARY = "canary-listed-19ab33"
ODD = 'two words; $(touch HERE) "quoted"'
SECONDS = 300
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed"))]
OURS = [sys.executable, "-m", "launch.hosts"]
# Ends with a code that the test chooses; or runs until it is told to stop.
PDSH = """#!/bin/sh
case "$*" in
  *pkill*) printf '%s\\n' "$*" > {folder}/stop; kill -USR1 $(cat {folder}/pid);;
  *) trap 'exit 75' USR1; echo $$ > {folder}/pid; printf '%s\\n' "$*" > {folder}/.line; mv {folder}/.line {folder}/line
     printf '%s' "$PDSH_SSH_ARGS_APPEND" > {folder}/ssh_options
     if [ -n "$RUN_ON" ]; then while :; do sleep 0.1; done; fi; exit $ENDING;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a hostfile, a list of variables and the pretended programs."""
    (tmp_path / "bin").mkdir()
    for name, text in (("pdsh", PDSH.format(folder=tmp_path)), ("ssh", "#!/bin/sh\nexit 0\n")):
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME=eth0\nWANDB_API_KEY={LISTED_CANARY}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", CANARY)
    monkeypatch.setenv("UCX_NET_DEVICES", ODD)
    monkeypatch.setenv("ENDING", "0")
    return tmp_path


def command(program: list[str], *options: str) -> list[str]:
    where = ["--hostfile", "hosts", "--master_addr", "10.0.0.1", *options]
    return [*program, *where, "train.py", "--run.folder", "a b", f"--x={CANARY}"]


def launch(program: list[str], *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(program, *options), capture_output=True, text=True, timeout=SECONDS)


def exported(line: str, folder: Path) -> dict[str, str]:
    """What a shell on a host makes of the line's exports."""
    exports = line[line.index("export ") : line.index(f"cd {folder}")]
    done = subprocess.run(["sh", "-c", f"{exports} env -0"], env={}, capture_output=True, text=True, check=True)
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_left_alone_deepspeed_shows_secrets_and_runs_what_stands_in_variables(place: Path) -> None:
    """Why there is a front of our own; when this fails, DeepSpeed has changed."""
    done = launch(DEEPSPEED)
    line = (place / "line").read_text()
    for canary in (CANARY, LISTED_CANARY):
        assert canary in line and canary in done.stdout
    exported(line, place)
    assert (place / "HERE").exists()


def test_no_secret_is_on_a_command_line_or_in_the_log_and_the_rest_arrives_as_it_is(place: Path) -> None:
    done = launch(OURS)
    assert done.returncode == 0, done.stderr
    line = (place / "line").read_text()
    variables = exported(line, place)
    assert not {"MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"} & set(variables)
    assert LISTED_CANARY not in line and line.count(CANARY) == 1, "only what the user wrote on the command line"
    assert CANARY not in done.stdout + done.stderr and LISTED_CANARY not in done.stdout + done.stderr
    assert "--x=[secret]" in done.stdout
    for name in ("MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"):
        assert f"{name} is not given to the hosts" in done.stderr
    assert (variables["UCX_NET_DEVICES"], variables["GLOO_SOCKET_IFNAME"]) == (ODD, "eth0")
    assert str(ROOT) in variables["PYTHONPATH"].split(":")
    assert not (place / "HERE").exists()
    assert shlex.split(line)[-4:] == ["train.py", "--run.folder", "a b", f"--x={CANARY}"]
    assert "ServerAliveInterval" in (place / "ssh_options").read_text()


@pytest.mark.parametrize(("ending", "expected"), [("1", 1), ("255", 75)])
def test_it_ends_as_the_ranks_do_and_a_lost_host_is_worth_a_retry(
    place: Path, monkeypatch: pytest.MonkeyPatch, ending: str, expected: int
) -> None:
    monkeypatch.setenv("ENDING", ending)
    done = launch(OURS)
    assert done.returncode == expected
    assert ("a host was lost" in done.stderr) == (ending == "255")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_this_jobs_ranks_to_save_and_no_others(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("RUN_ON", "1")
    front = subprocess.Popen(command(OURS), stderr=subprocess.PIPE, text=True)
    wait_for(place / "line")
    front.send_signal(number)
    _, said = front.communicate(timeout=SECONDS)
    assert front.returncode == 75, said
    assert "asking all ranks to save and stop" in said
    stop = (place / "stop").read_text()
    assert "-w n1,n2" in stop and "pkill -USR1" in stop
    (pattern,) = re.findall(r"pgrep -d, -f '([^']+)'", stop)
    line = (place / "line").read_text()
    launcher = line[line.index(f"cd {place}; ") + len(f"cd {place}; ") :]
    assert re.search(pattern, launcher)
    assert not re.search(pattern, launcher.replace("--master_port=29500", "--master_port=29501"))
    assert not re.search(pattern, f"bash -c {launcher}"), "the shell around it"


def wait_for(file: Path) -> None:
    end = time.monotonic() + SECONDS
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert file.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hostfile", "nowhere"], "--hostfile nowhere: there is no such file"),
        (["--hostfile", "hosts", "--include", "n9"], "'n9' not found in hostfile"),
        (["--hostfile", "hosts", "--include", "n2:4"], "No slot '4' specified on host 'n2'"),
        (["--hostfile", "hosts", "--launcher", "mvapich", "--include", "n1@n2"], "does not support"),
        (["--hostfile", "bad"], "bad entry"),
    ],
)
def test_what_cannot_be_used_is_one_message(place: Path, options: list[str], message: str) -> None:
    (place / "bad").write_text("n1 4\n")
    with pytest.raises(UserError, match=re.escape(message)):
        launch_on_hosts([*options, "--master_addr", "10.0.0.1", "train.py"])


def test_a_line_that_is_no_variable_is_refused_without_being_shown(place: Path) -> None:
    (place / ".deepspeed_env").write_text(f"{CANARY}\n")
    with pytest.raises(UserError, match="is not NAME=VALUE") as caught:
        launch_on_hosts(["--hostfile", "hosts", "--master_addr", "10.0.0.1", "train.py"])
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("MLFLOW_TRACKING_URI", "https://host", True),
        ("HF_TOKEN", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("PYTHON_INDEX", "https://me:word@host/simple", True),
        ("PYTHONPATH", "/a:/b", False),
        ("NCCL_SOCKET_IFNAME", "eth0", False),
        ("GIT_AUTHOR_NAME", "me", False),
    ],
)
def test_what_counts_as_a_secret(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) == secret


def test_values_to_hide_are_whole_before_their_parts(place: Path) -> None:
    assert secret_values({"A_TOKEN": "abcdef", "B_TOKEN": "abcdefgh", "C_TOKEN": "no", "D": "plainly"}) == [
        LISTED_CANARY,
        "abcdefgh",
        "abcdef",
    ]
