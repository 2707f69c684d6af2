"""Environment variables that torch and DeepSpeed read on import, set from what the launcher and the machine say.

Called first thing by every training front, before torch is imported; needs nothing but the standard library. A
variable that is already set is the user's choice and stays, but for the one that keeps pickles from being run.
"""

import importlib.util
import os
import re
import runpy
import socket
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOOPBACK = "lo"
SINGLE_NODE_ADDRESS = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 20000
DEFAULT_PORT = 29500


def prepare_environment() -> None:
    """Make rank variables, accelerator, threads per rank, network interface and extensions folder explicit."""
    # DeepSpeed's loaders ask torch for full pickles, which can run code. Not a choice: nothing here needs them.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    _adopt_launcher_variables()
    if not cuda_possible():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank()))
    if single_node():
        os.environ.setdefault("MASTER_ADDR", SINGLE_NODE_ADDRESS)
        if LOOPBACK in {name for _, name in socket.if_nameindex()}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))


def rank() -> int:
    """This process among all ranks of the job."""
    return _integer("RANK", 0)


def world_size() -> int:
    """Number of ranks of the job."""
    return _integer("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process among the ranks of its machine."""
    return _integer("LOCAL_RANK", 0)


def meeting_point() -> str:
    """Where the ranks find each other, as torch.distributed's `init_method`."""
    port = os.environ.get("MASTER_PORT", "0" if world_size() == 1 else str(DEFAULT_PORT))
    return f"tcp://{os.environ.get('MASTER_ADDR', SINGLE_NODE_ADDRESS)}:{port}"


def single_node() -> bool:
    """Whether all ranks of the job run on this machine."""
    return local_world_size() == world_size()


def local_world_size() -> int:
    """Number of ranks on this machine, as the launcher states it; 1 without a launcher."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return _integer(name, 1)
    return 1


def threads_per_rank() -> int:
    """CPU cores that this rank may use: its own under Slurm, else an equal part of the machine's."""
    if "SLURM_STEP_ID" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        return _integer("SLURM_CPUS_PER_TASK", 1)
    return max(1, usable_cores() // local_world_size())


def usable_cores() -> int:
    """Cores this process may run on: affinity, further limited by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, _, period = quota_file.read_text().partition(" ")
        if quota.isdecimal():
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def cuda_possible() -> bool:
    """Whether torch was built for CUDA and this machine shows an NVIDIA device. Imports nothing."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
    return bool(devices) and _torch_cuda_version() is not None


def extensions_folder() -> Path:
    """Our own folder for anything DeepSpeed compiles, so that another program's stale lock can't block a start."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = [f"{name}-{_version(name)}" for name in ("torch", "deepspeed")]
    return cache / "llamapro" / "extensions" / "-".join(parts)


def _adopt_launcher_variables() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and the meeting point from srun's or Open MPI's own variables."""
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        _adopt("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(_slurm_local_tasks()))
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
        _choose_port(f"{os.environ.get('SLURM_JOB_ID')}.{os.environ['SLURM_STEP_ID']}")
    elif "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" in os.environ:
        _adopt("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
        _choose_port(os.environ.get("PMIX_NAMESPACE", "").partition("@")[0])
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)


def _adopt(rank: str, world_size: str, local_rank: str) -> None:
    os.environ["RANK"] = os.environ[rank]
    os.environ["WORLD_SIZE"] = os.environ[world_size]
    os.environ["LOCAL_RANK"] = os.environ[local_rank]


def _choose_port(job: str) -> None:
    """The same port on every rank of a job, another one for another job."""
    os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS))


def _slurm_local_tasks() -> int:
    """Tasks of this step on this node, from a list such as "4(x2),3"."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(_integer("SLURM_NODEID", 0), len(counts) - 1)]


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[007-009,12],login1" → "gpu007"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _torch_cuda_version() -> str | None:
    """The CUDA version torch was built for, read from its version file without importing torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    value: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    return value


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _integer(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
