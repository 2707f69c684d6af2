"""Training on several hosts with a hostfile, for real: addresses, names and sshd of their own, cables that are cut."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.data import build, random_texts, save_tokenizer, shard_bytes, write_jsonl
from tests.support.hosts import Hosts, address, obstacle, running_hosts
from tests.support.source import ROOT
from tests.support.training import losses, prepare, settings, state_digest

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]

DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")),)
OURS = (sys.executable, "-m", "launch.hosts")
PRETRAIN = str(ROOT / "launch" / "pretrain.py")
CANARY = "canary-5d0b77e1c9"
SECONDS = 600
STEP_TIMEOUT_SECONDS = 30
# Steps of runs that are disturbed: enough for the disturbance to come before the end.
LONG = 60


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts; their shared folder has a model, two datasets and the variables that ranks need without GPUs."""
    folder = prepare(tmp_path_factory.mktemp("hosts"))
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    with running_hosts(folder, 3) as running:
        yield running


@pytest.fixture(scope="module")
def alone(hosts: Hosts) -> Callable[..., Path]:
    """The run of so many ranks on one host, made when it is first asked for."""

    def made(ranks: int, steps: int = 8) -> Path:
        run = hosts.folder / f"alone-{ranks}-{steps}"
        if not run.exists():
            done = launch(hosts, DEEPSPEED, configured(hosts, run.name, steps), hosts.hostfile("one", n1=ranks))
            assert done[0] == 0, done[1]
        return run

    return made


def configured(hosts: Hosts, name: str, steps: int = 8) -> list[str]:
    """The training command of a run at ZeRO-3 on tiny data."""
    engine = {"zero_stage": 3, "step_timeout_minutes": STEP_TIMEOUT_SECONDS / 60}
    every = {"every_steps": steps // 2}
    values = settings(hosts.folder, name, schedule={"steps": steps}, engine=engine, validation=every, checkpoint=every)
    file = hosts.folder / f"{name}.json"
    file.write_bytes(orjson.dumps(values))
    return [PRETRAIN, "--config", str(file)]


def launch(
    hosts: Hosts, program: tuple[str, ...], command: list[str], hostfile: str, *options: str, **variables: str
) -> tuple[int, str]:
    """Run from the first host; the exit code and all that was said."""
    words = [*program, "--hostfile", hostfile, *options, *command]
    done = hosts.run("n1", *words, timeout=SECONDS, **variables)
    return done.returncode, done.stdout + done.stderr


def metrics(run: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def assert_same(run: Path, reference: Path) -> None:
    """Losses and weights, bit for bit."""
    assert losses(metrics(run)) == losses(metrics(reference))
    assert state_digest(run) == state_digest(reference)


def wait_for_step(run: Path, step: int, front: Any, log: Path) -> None:
    end = time.monotonic() + SECONDS
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"gradient_norm") < step:
        assert front.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_two_hosts_give_the_losses_of_one(hosts: Hosts, alone: Callable[..., Path]) -> None:
    code, said = launch(hosts, DEEPSPEED, configured(hosts, "two"), hosts.hostfile("two", n1=1, n2=1))
    assert code == 0, said
    assert_same(hosts.folder / "two", alone(2))
    for number in (1, 2):
        assert f"n{number}: rank {number - 1} on the CPU with 1 thread each" in said
    assert f"2 ranks around tcp://{address('n1')}:29500" in said


def test_three_hosts_with_our_front_see_no_secret(hosts: Hosts, alone: Callable[..., Path]) -> None:
    log = hosts.folder / "three.log"
    words = [*OURS, "--hostfile", hosts.hostfile("three", n1=1, n2=1, n3=1), *configured(hosts, "three")]
    front = hosts.start("n1", log, *words, MLFLOW_TRACKING_TOKEN=CANARY, UCX_NET_DEVICES="eth0")
    seen: dict[str, set[str]] = {name: set() for name in hosts.names}
    end = time.monotonic() + SECONDS
    while front.poll() is None:
        assert time.monotonic() < end, log.read_text()
        for name, lines in seen.items():
            lines.update(hosts.processes(name, "").values())
        time.sleep(0.2)
    assert front.wait() == 0, log.read_text()
    for name, lines in seen.items():
        assert any("launch/pretrain.py --local_rank=0" in line for line in lines), name
    lines = set().union(*seen.values())
    assert any("UCX_NET_DEVICES=eth0" in line for line in lines), "exports are on command lines"
    assert not any(CANARY in line for line in lines)
    assert CANARY not in log.read_text()
    assert "MLFLOW_TRACKING_TOKEN is not given to the hosts" in log.read_text()
    assert_same(hosts.folder / "three", alone(3))


def test_hosts_may_have_different_slots_and_some_may_be_left_out(hosts: Hosts, alone: Callable[..., Path]) -> None:
    hostfile = hosts.hostfile("uneven", n1=1, n2=4, n3=8)
    code, said = launch(hosts, OURS, configured(hosts, "uneven"), hostfile, "--include", "n1@n2:1,3")
    assert code == 0, said
    assert "n1: rank 0 on" in said and "n2: ranks 1, 2 on" in said and "n3:" not in said
    assert_same(hosts.folder / "uneven", alone(3))


def test_a_link_cut_for_good_ends_both_sides_and_the_run_resumes(hosts: Hosts, alone: Callable[..., Path]) -> None:
    run, log, logs = hosts.folder / "cut", hosts.folder / "cut.log", hosts.folder / "cut-ranks"
    command, hostfile = configured(hosts, "cut", LONG), hosts.hostfile("two", n1=1, n2=1)
    words = [*OURS, "--hostfile", hostfile, "--enable_each_rank_log", str(logs), *command]
    options = "-o ServerAliveInterval=2 -o ServerAliveCountMax=2"
    front = hosts.start("n1", log, *words, PDSH_SSH_ARGS_APPEND=options)
    wait_for_step(run, LONG // 2 + 1, front, log)
    hosts.cut("n2")
    start = time.monotonic()
    try:
        assert front.wait(SECONDS) == 75, log.read_text()
        wait_until_no_rank_lives(hosts)
    finally:
        hosts.mend("n2")
    assert time.monotonic() - start < 4 * STEP_TIMEOUT_SECONDS
    said = {file.stem[-1]: file.read_text() for file in logs.glob("*_rank?.log")}
    assert set(said) == {"0", "1"}
    assert all("ending with 75" in text for text in said.values()), said
    assert len(losses(metrics(run))) < LONG
    code, output = launch(hosts, OURS, command, hostfile)
    assert code == 0, output
    assert f"continuing after step {LONG // 2}" in output
    assert_same(run, alone(2, LONG))


def wait_until_no_rank_lives(hosts: Hosts) -> None:
    end = time.monotonic() + SECONDS
    while any(hosts.processes(name, "launch/pretrain.py") for name in hosts.names):
        assert time.monotonic() < end, [hosts.processes(name, "launch/pretrain.py") for name in hosts.names]
        time.sleep(0.2)


def test_ending_our_front_saves_and_the_run_continues(hosts: Hosts, alone: Callable[..., Path]) -> None:
    run, log = hosts.folder / "ended", hosts.folder / "ended.log"
    command, hostfile = configured(hosts, "ended", LONG), hosts.hostfile("two", n1=1, n2=1)
    front = hosts.start("n1", log, *OURS, "--hostfile", hostfile, *command)
    wait_for_step(run, 1, front, log)
    (pid,) = hosts.processes("n1", "launch.hosts")
    os.kill(pid, signal.SIGTERM)
    assert front.wait(SECONDS) == 75, log.read_text()
    assert len(losses(metrics(run))) < LONG
    code, said = launch(hosts, OURS, command, hostfile)
    assert code == 0, said
    assert_same(run, alone(2, LONG))


def test_mpirun_starts_ranks_as_well(hosts: Hosts, alone: Callable[..., Path]) -> None:
    prefix = Path(sys.executable).parents[1]
    launcher_args = f"--prefix {prefix} --allow-run-as-root --mca btl_tcp_if_include eth0"
    code, said = launch(
        hosts, OURS, configured(hosts, "mpi"), hosts.hostfile("two", n1=1, n2=1),
        "--launcher", "openmpi", "--launcher_args", launcher_args,
    )  # fmt: skip
    assert code == 0, said
    assert "n2: rank 1 on" in said
    assert_same(hosts.folder / "mpi", alone(2))


def test_the_doctor_passes_hosts_that_fit_and_names_the_one_that_does_not(hosts: Hosts) -> None:
    shared = hosts.folder / "runs"
    shared.mkdir()
    command = [str(ROOT / "launch" / "doctor.py"), "--folder", str(shared)]
    hostfile = hosts.hostfile("three", n1=1, n2=1, n3=1)
    code, said = launch(hosts, OURS, command, hostfile)
    assert "every host sees what the others write" in said and "n3 → n1" in said
    assert code == 0, said
    assert hosts.run("n3", "mount", "-t", "tmpfs", "tmpfs", str(shared)).returncode == 0
    try:
        code, said = launch(hosts, OURS, command, hostfile)
    finally:
        hosts.run("n3", "umount", str(shared))
    assert code == 1, said
    assert "n3 does not see what n1 and n2 wrote" in said


def test_mpiexec_tokenizes_on_two_hosts_as_one_process_does(hosts: Hosts) -> None:
    place = hosts.folder / "texts"
    save_tokenizer(place / "model")
    for number in range(6):
        write_jsonl(place / "in" / f"{number}.jsonl", random_texts(40, seed=number))
    build([place / "in"], place / "model", place / "alone", heldout=0.1)
    programs = Path(sys.executable).parent
    mpiexec = [str(programs / "mpiexec"), "--prefix", str(programs.parent), "--allow-run-as-root", "-n", "2"]
    tool = [sys.executable, "-m", "data_tools.build", "--input", str(place / "in"), "--tokenizer", str(place / "model")]
    done = hosts.run(
        "n1", *mpiexec, "--host", "n1:1,n2:1", "-x", "PYTHONPATH",
        *tool, "--output", str(place / "together"), "--heldout", "0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shard_bytes(place / "together") == shard_bytes(place / "alone")
