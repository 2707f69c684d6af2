"""Training on several hosts with a hostfile, for real: addresses, names and sshd of their own, cables that are cut."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.hosts import Hosts, address, obstacle, running_hosts
from tests.support.source import ROOT
from tests.support.training import losses, prepare, settings, state_digest

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]

DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")),)
OURS = (sys.executable, "-m", "launch.hosts")
PRETRAIN = str(ROOT / "launch" / "pretrain.py")
CANARY = "canary-5d0b77e1c9"
SECONDS = 600
STEP_TIMEOUT_SECONDS = 15


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts; their shared folder has a model, two datasets and the variables that ranks need without GPUs."""
    folder = prepare(tmp_path_factory.mktemp("hosts"))
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    with running_hosts(folder, 3) as running:
        yield running


@pytest.fixture(scope="module")
def alone(hosts: Hosts) -> Callable[[int], Path]:
    """The run of so many ranks on one host, made when it is first asked for."""

    def made(ranks: int) -> Path:
        run = hosts.folder / f"alone-{ranks}"
        if not run.exists():
            done = launch(hosts, DEEPSPEED, configured(hosts, run.name), hosts.hostfile("one", n1=ranks))
            assert done[0] == 0, done[1]
        return run

    return made


def configured(hosts: Hosts, name: str, **sections: dict[str, Any]) -> list[str]:
    """The training command of a run at ZeRO-3 on tiny data."""
    engine = {"zero_stage": 3, "step_timeout_minutes": STEP_TIMEOUT_SECONDS / 60, **sections.pop("engine", {})}
    values = settings(hosts.folder, name, engine=engine, **sections)
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
    assert len(losses(metrics(run))) == 8
    assert state_digest(run) == state_digest(reference)


def wait_for_step(run: Path, step: int, front: Any, log: Path) -> None:
    end = time.monotonic() + SECONDS
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"gradient_norm") < step:
        assert front.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_two_hosts_give_the_losses_of_one(hosts: Hosts, alone: Callable[[int], Path]) -> None:
    code, said = launch(hosts, DEEPSPEED, configured(hosts, "two"), hosts.hostfile("two", n1=1, n2=1))
    assert code == 0, said
    assert_same(hosts.folder / "two", alone(2))
    for number in (1, 2):
        assert f"n{number}: rank {number - 1} on the CPU with 1 thread each" in said
    assert f"2 ranks around tcp://{address('n1')}:29500" in said


def test_three_hosts_with_our_front_see_no_secret(hosts: Hosts, alone: Callable[[int], Path]) -> None:
    log = hosts.folder / "three.log"
    words = [*OURS, "--hostfile", hosts.hostfile("three", n1=1, n2=1, n3=1), *configured(hosts, "three")]
    front = hosts.start("n1", log, *words, MLFLOW_TRACKING_TOKEN=CANARY, UCX_NET_DEVICES="eth0")
    wait_for_step(hosts.folder / "three", 1, front, log)
    lines = [line for name in hosts.names for line in hosts.processes(name, "").values()]
    assert front.wait(SECONDS) == 0, log.read_text()
    assert sum("launch/pretrain.py" in line and "local_rank" in line for line in lines) >= 3
    assert any("UCX_NET_DEVICES=eth0" in line for line in lines), "exports are on command lines"
    assert not any(CANARY in line for line in lines)
    assert CANARY not in log.read_text()
    assert "MLFLOW_TRACKING_TOKEN is not given to the hosts" in log.read_text()
    assert_same(hosts.folder / "three", alone(3))


def test_hosts_may_have_different_slots_and_some_may_be_left_out(hosts: Hosts, alone: Callable[[int], Path]) -> None:
    hostfile = hosts.hostfile("uneven", n1=1, n2=4, n3=8)
    code, said = launch(hosts, OURS, configured(hosts, "uneven"), hostfile, "--include", "n1@n2:1,3")
    assert code == 0, said
    assert "n1: rank 0 on" in said and "n2: ranks 1, 2 on" in said and "n3:" not in said
    assert_same(hosts.folder / "uneven", alone(3))
