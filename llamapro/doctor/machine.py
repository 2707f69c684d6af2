"""This machine: GPUs, attention kernels, compiler, memory, disk, limits. Needs torch, and no process group."""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import psutil
import torch

from llamapro.doctor.finding import FAILED, NOTE, OK, Finding, State
from llamapro.engine.environment import usable_cores
from llamapro.modeling.attention import AttentionNeeds, kernel_obstacle
from llamapro.modeling.compiled import compiler_obstacle
from llamapro.modeling.flash import newest_flash

GIB: Final = 1 << 30
MIB: Final = 1 << 20
HEAD_DIM: Final = 128
KERNELS: Final = ("flash", "cudnn", "sdpa", "math")
LEAST_FREE_DISK: Final = 10 * GIB
CONTAINER_SHARED_MEMORY: Final = 64 * MIB
"""What containers get when nobody asks for more: too little for NCCL between two GPUs."""
ENOUGH_SHARED_MEMORY: Final = GIB
LEAST_OPEN_FILES: Final = 1024
SHARED_MEMORY: Final = Path("/dev/shm")
RDMA_DEVICES: Final = Path("/sys/class/infiniband")


def check_machine(folder: Path) -> list[Finding]:
    """Everything about this machine.

    Args:
        folder: where runs will write.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ports = rdma_ports(RDMA_DEVICES)
    return [
        *check_gpus(),
        *check_attention(device),
        check_compiler(device),
        check_memory(),
        check_shared_memory(SHARED_MEMORY, torch.cuda.device_count()),
        check_disk(folder),
        check_network(ports),
        *check_limits(rdma=bool(ports)),
    ]


def check_gpus() -> list[Finding]:
    """The GPUs that training would use, or why it would use none."""
    if torch.cuda.is_available():
        return _gpus()
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
    return [judge_unused_gpus(len(devices), torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def judge_unused_gpus(devices: int, built_for: str | None, visible: str | None) -> Finding:
    """Why torch shows no GPU.

    Args:
        devices: NVIDIA devices that the machine shows.
        built_for: the CUDA version that torch was built for; None: for none.
        visible: CUDA_VISIBLE_DEVICES.
    """
    if not devices:
        return Finding("GPUs", NOTE, "none; training runs on the CPU")
    there = f"{devices} NVIDIA device{'s' if devices != 1 else ''}"
    if visible in ("", "-1"):
        return Finding("GPUs", NOTE, f"{there}, hidden by CUDA_VISIBLE_DEVICES={visible!r}; training runs on the CPU")
    if built_for is None:
        why = f"torch {torch.__version__} was built without CUDA; install a build with it"
    else:
        why = f"torch can't use them: is the driver new enough for CUDA {built_for}? nvidia-smi shows it"
    return Finding("GPUs", FAILED, f"{there}, but {why}")


def _gpus() -> list[Finding]:
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = {(one.name, one.total_memory // MIB, one.major, one.minor) for one in properties}
    names = ", ".join(f"{name}, {mib / 1024:.1f} GiB, capability {a}.{b}" for name, mib, a, b in sorted(kinds))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    state: State = OK if len(kinds) == 1 else NOTE
    return [
        Finding("GPUs", state, f"{len(properties)} × {names}" if len(kinds) == 1 else f"of different kinds: {names}"),
        Finding("CUDA", OK, f"{torch.version.cuda}, NCCL {nccl}"),
    ]


def check_attention(device: torch.device) -> list[Finding]:
    """Which attention kernels of `engine.attention` run in bf16, and why others don't; and which FlashAttention."""
    needs = AttentionNeeds(head_dim=HEAD_DIM)
    obstacles = {name: kernel_obstacle(name, device, torch.bfloat16, needs) for name in KERNELS}
    usable = [name for name, obstacle in obstacles.items() if not obstacle]
    found = [Finding("attention", OK, ", ".join(usable))]
    found += [Finding(f"attention {name}", NOTE, why) for name, why in obstacles.items() if why]
    if not obstacles["flash"]:
        flash = newest_flash(torch.cuda.get_device_capability(device)[0], HEAD_DIM)
        found.append(Finding("FlashAttention", OK, f"{flash.name} ({flash.reason})"))
    return found


def check_compiler(device: torch.device) -> Finding:
    """Whether `engine.compile` can compile. For GPUs triton compiles its launchers with a C compiler."""
    obstacle = compiler_obstacle(device)
    if device.type == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        obstacle = obstacle or "there is no C compiler (cc, gcc, clang); triton needs one"
    return Finding("compile", NOTE if obstacle else OK, obstacle or f"torch.compile can compile for {device.type}")


def check_memory() -> Finding:
    """Cores and host memory."""
    memory = psutil.virtual_memory()
    free, total = memory.available / GIB, memory.total / GIB
    return Finding("host", OK, f"{usable_cores()} cores, {free:.1f} of {total:.1f} GiB memory free")


def check_shared_memory(folder: Path, gpus: int) -> Finding:
    """Whether processes of one machine can share memory, as NCCL's do."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("shared memory", FAILED, f"{folder} can't be written; mount it (tmpfs)")
    return judge_shared_memory(shutil.disk_usage(folder).total, gpus)


def judge_shared_memory(total: int, gpus: int) -> Finding:
    """What so many bytes of shared memory mean for so many GPUs."""
    size = f"{total / MIB:,.0f} MiB"
    advice = "give the container more: --ipc=host or --shm-size=8g"
    if gpus > 1 and total <= CONTAINER_SHARED_MEMORY:
        return Finding("shared memory", FAILED, f"{size} are too little for {gpus} GPUs; {advice}")
    if gpus > 1 and total < ENOUGH_SHARED_MEMORY:
        return Finding("shared memory", NOTE, f"{size} are little for {gpus} GPUs; {advice}")
    return Finding("shared memory", OK, size)


def check_disk(folder: Path) -> Finding:
    """Whether the folder can be written, and how much space it has."""
    what = f"disk of {folder}"
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        return Finding(what, FAILED, f"can't be written: {error.strerror}")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_DISK:
        return Finding(
            what, NOTE, f"{free / GIB:.1f} GiB free; checkpoints need 12 bytes per weight that learns, twice"
        )
    return Finding(what, OK, f"{free / GIB:,.0f} GiB free")


def rdma_ports(folder: Path) -> list[str]:
    """Active ports of InfiniBand and RoCE adapters, e.g. "mlx5_0/1: 400 Gb/sec (4X NDR)"."""
    ports = []
    for port in sorted(folder.glob("*/ports/*")):
        if "ACTIVE" in (port / "state").read_text():
            rate = (port / "rate").read_text().strip()
            ports.append(f"{port.parents[1].name}/{port.name}: {rate}")
    return ports


def check_network(ports: Sequence[str]) -> Finding:
    """Adapters that NCCL would use between hosts."""
    return Finding("InfiniBand, RoCE", OK, "; ".join(ports) or "none; hosts talk over TCP")


def check_limits(rdma: bool) -> list[Finding]:
    """What the shell allows a process: open files, and memory that adapters may read."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return [judge_open_files(files), judge_locked_memory(locked, rdma)]


def judge_open_files(limit: int) -> Finding:
    """Whether so many open files are enough for shards, sockets and checkpoints."""
    if limit == resource.RLIM_INFINITY or limit >= LEAST_OPEN_FILES:
        return Finding("open files", OK, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}")
    return Finding("open files", FAILED, f"{limit:,}; at least {LEAST_OPEN_FILES:,} are needed: ulimit -n 65536")


def judge_locked_memory(limit: int, rdma: bool) -> Finding:
    """RDMA adapters need memory that stays where it is."""
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", OK, "unlimited")
    size = f"{limit / MIB:,.0f} MiB"
    if rdma:
        return Finding("locked memory", FAILED, f"{size}; RDMA needs more: ulimit -l unlimited, --ulimit memlock=-1")
    return Finding("locked memory", OK, f"{size}; RDMA would need more")
