"""Rank variables, threads, interface and port from each launcher's own variables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro.engine import environment

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
OURS = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "TORCH_EXTENSIONS_DIR", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher."""
    foreign = [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI"))]
    for name in (*LAUNCHER_VARIABLES, *OURS, *foreign):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def under(patch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        patch.setenv(name, str(value))
    environment.prepare_environment()


def test_without_a_launcher_there_is_one_rank_with_all_cores(clean: pytest.MonkeyPatch) -> None:
    under(clean)
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (0, 1, 0)
    assert os.environ["OMP_NUM_THREADS"] == str(environment.usable_cores())
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_under_the_deepspeed_launcher_ranks_share_the_cores(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(environment, "usable_cores", lambda: 9)
    under(clean, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29501)
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert environment.meeting_point() == "tcp://127.0.0.1:29501"
    assert environment.single_node()


def test_several_nodes_are_not_confined_to_loopback(clean: pytest.MonkeyPatch) -> None:
    under(clean, RANK=9, LOCAL_RANK=1, WORLD_SIZE=16, LOCAL_WORLD_SIZE=8, MASTER_ADDR="node1", MASTER_PORT=1)
    assert "GLOO_SOCKET_IFNAME" not in os.environ and not environment.single_node()


def test_what_the_user_set_stays(clean: pytest.MonkeyPatch) -> None:
    under(clean, OMP_NUM_THREADS=7, GLOO_SOCKET_IFNAME="eth0", TORCH_EXTENSIONS_DIR="/tmp/mine")
    values = [os.environ[name] for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "TORCH_EXTENSIONS_DIR")]
    assert values == ["7", "eth0", "/tmp/mine"]


def test_under_srun(clean: pytest.MonkeyPatch) -> None:
    step = {
        "SLURM_JOB_ID": 77,
        "SLURM_STEP_ID": 0,
        "SLURM_STEP_NUM_TASKS": 11,
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_STEP_NODELIST": "gpu[007-009]",
        "SLURM_CPUS_PER_TASK": 6,
    }
    under(clean, **step, SLURM_PROCID=9, SLURM_LOCALID=1, SLURM_NODEID=2)
    assert (environment.rank(), environment.local_rank(), environment.world_size()) == (9, 1, 11)
    assert environment.local_world_size() == 3 and os.environ["OMP_NUM_THREADS"] == "6"
    assert os.environ["MASTER_ADDR"] == "gpu007"
    port = os.environ["MASTER_PORT"]
    for name in LAUNCHER_VARIABLES:
        clean.delenv(name, raising=False)
    under(clean, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NODEID=0)
    assert environment.local_world_size() == 4
    assert os.environ["MASTER_PORT"] == port, "ranks of one step must meet at one port"


def test_a_batch_script_that_is_no_step_is_one_rank(clean: pytest.MonkeyPatch) -> None:
    under(clean, SLURM_JOB_ID=77, SLURM_PROCID=0, SLURM_NTASKS=16)
    assert environment.world_size() == 1


def test_under_open_mpi(clean: pytest.MonkeyPatch) -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = dict(zip((f"OMPI_COMM_WORLD_{name}" for name in names), (1, 2, 1, 2), strict=True))
    under(clean, **values, PMIX_NAMESPACE="host-4711@1")
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (1, 2, 1)
    assert environment.single_node() and os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],login1", "gpu007"),
        ("gpu12", "gpu12"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]-node[3,5]", "rack1-node3"),
        ("n[4]-ib", "n4-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert environment.first_host(nodes) == first


def test_hidden_devices_mean_cpu(clean: pytest.MonkeyPatch) -> None:
    under(clean, CUDA_VISIBLE_DEVICES="")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_torch_is_not_imported() -> None:
    program = (
        "import sys; from llamapro.engine.environment import prepare_environment; prepare_environment();"
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
