"""The image's steps are executed, as the CPU variant on Debian, and what comes out works for whoever runs it.

Minutes and gigabytes: everything lies in one folder, which is removed.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llamapro.engine.ports import free_port
from tests.support.images import BASE, Images, pip_settings, why_not
from tests.support.source import ROOT

pytestmark = pytest.mark.cluster

RELEASE = "bookworm"  # what the Dockerfile's own base is
IMAGE, CONTAINER = "localhost/llamapro:latest", "llamapro"
STRANGER = 54321  # has no account in the image, and no home
TRAIN_SECONDS, STOP_SECONDS = 600, 180
LAUNCH = "/opt/llamapro/launch"
LONG_RUN = "work/long"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """The image, and one container of it."""
    if reason := why_not():
        pytest.skip(reason)
    made = Images(tmp_path_factory.mktemp("image") / "store")
    try:
        made.bootstrap(RELEASE)
        made.build(ROOT, ROOT / "docker" / "Dockerfile", IMAGE, BASE=BASE)
        made.buildah("rmi", BASE)
        made.start(IMAGE, CONTAINER)
        yield made
    finally:
        end_processes_of(STRANGER)
        made.remove()


@pytest.fixture(scope="module")
def configuration(images: Images) -> dict[str, Any]:
    return images.configuration(IMAGE)


def processes_of(user: int) -> list[int]:
    """Processes of a user: in a chroot they are the machine's own."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if owner(path) == user]


def owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


def end_processes_of(user: int) -> None:
    for process in processes_of(user):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def program_of(process: int) -> str:
    """Its name; empty when it has just ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def run(images: Images, configuration: dict[str, Any], *command: str, user: int = STRANGER) -> str:
    """Run a command as the image runs it; returns its output."""
    return images.must(images.in_container(CONTAINER, user, [*configuration["Entrypoint"], *command]))


def fails(images: Images, *command: str) -> bool:
    line = images.in_container(CONTAINER, STRANGER, command)
    return subprocess.run(line, env=images.environment(), capture_output=True).returncode != 0


def test_its_own_command_works_for_its_own_user(images: Images, configuration: dict[str, Any]) -> None:
    user = int(configuration["User"].partition(":")[0])
    assert user != 0
    assert "usage: llamapro" in run(images, configuration, *configuration["Cmd"], user=user)


def test_health_check_passes(images: Images, configuration: dict[str, Any]) -> None:
    kind, *command = configuration["Healthcheck"]["Test"]
    assert kind == "CMD"
    run(images, configuration, *command)


def test_whoever_runs_it_writes_into_the_workspace_and_nowhere_in_the_program(images: Images) -> None:
    assert not fails(images, "test", "-w", "/workspace")
    assert not fails(images, "test", "-w", "/tmp")
    places = ("/", "/opt/llamapro", "/opt/llamapro/bin", "/etc", "/home")
    assert [place for place in places if not fails(images, "test", "-w", place)] == []


def test_programs_are_compiled_where_it_runs(images: Images, configuration: dict[str, Any]) -> None:
    program = "import torch; print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).tolist())"
    assert "[1.0, 1.0, 1.0]" in run(images, configuration, "python", "-c", program)


def test_tokenizing_ranks_find_each_other(images: Images, configuration: dict[str, Any]) -> None:
    program = "from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2"
    run(images, configuration, "mpiexec", "-n", "2", "--oversubscribe", "python", "-c", program)


def test_nothing_of_the_machine_that_built_it_is_inside(images: Images, configuration: dict[str, Any]) -> None:
    said = str(configuration)
    assert [value for value in pip_settings().values() if value.startswith("/") and value in said] == []
    assert (images.root_of(CONTAINER) / "source").exists() is False
    settings = images.root_of(CONTAINER) / "etc" / "pip.conf"
    assert not settings.exists() or settings.read_text() == ""


def test_quickstart_runs_for_a_user_without_account_and_home(images: Images, configuration: dict[str, Any]) -> None:
    output = run(images, configuration, "python", "-m", "llamapro.launch.quickstart", "--steps", "4")
    assert "finished after" in output
    folder = images.root_of(CONTAINER) / "workspace" / "work" / "quickstart"
    assert (folder / "short-4" / "export" / "model.safetensors").stat().st_uid == STRANGER


def test_a_stop_signal_reaches_every_rank_and_the_run_is_saved(images: Images, configuration: dict[str, Any]) -> None:
    """After the quickstart, whose model and data it trains on."""
    train = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    train += [f"{LAUNCH}/pretrain.py", "--config", f"{LAUNCH}/recipes/quickstart.yaml", "--run.folder", LONG_RUN]
    line = images.in_container(CONTAINER, STRANGER, [*configuration["Entrypoint"], *train, "--schedule.steps", "1000"])
    run_folder = images.root_of(CONTAINER) / "workspace" / LONG_RUN
    log = images.folder / "train.log"
    with (
        log.open("w") as output,
        subprocess.Popen(line, env=images.environment(), stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        wait_until(lambda: has_trained(run_folder), process, TRAIN_SECONDS, log)
        (first,) = [one for one in processes_of(STRANGER) if program_of(one) == "tini"]
        assert len(processes_of(STRANGER)) >= 4  # tini, the launcher and two ranks
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: processes_of(STRANGER) == [], process, STOP_SECONDS, log)
    assert list((run_folder / "checkpoints").glob("step-*")), log.read_text()


def has_trained(run_folder: Path) -> bool:
    metrics = run_folder / "metrics.jsonl"
    return metrics.is_file() and '"loss"' in metrics.read_text()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), log.read_text()
        assert time.monotonic() < deadline, f"still not so after {seconds} s:\n{log.read_text()}"
        time.sleep(0.5)
