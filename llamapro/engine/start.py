"""The process group: started once per job, with a stated timeout, loopback where that is enough, and no compiling.

DeepSpeed would build a shared-memory collective on every start on CPU: 50 s the first time, and a stale lock of a
killed build hangs every later start without a message. Only its tensor-parallel inference uses it, so it is left out.
"""

import os
import warnings
from datetime import timedelta

import deepspeed  # type: ignore[import-untyped]
import deepspeed.ops  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator  # type: ignore[import-untyped]
from deepspeed.comm import comm as deepspeed_comm  # type: ignore[import-untyped]
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as ZeroInitBase  # type: ignore[import-untyped]

from llamapro import console
from llamapro.config.engine import EngineConfig
from llamapro.engine import environment
from llamapro.engine.placement import describe_placement
from llamapro.errors import RetryLater, UserError
from llamapro.ranks import Ranks

WATCHDOG_MARGIN_MINUTES = 2.0
"""The process group's timeout, which may abort the process, comes this long after our own watchdog's."""
UNUSED_OPS = {"deepspeed_shm_comm": False}


def start_ranks(settings: EngineConfig, local_rank: int | None = None) -> Ranks:
    """Join the job's process group and say what was chosen.

    `prepare_environment` must have been called before torch was imported.

    Args:
        local_rank: what the `deepspeed` launcher passed on the command line; the environment's where None.

    Raises:
        UserError: the ranks of several machines don't know where to meet.
        RetryLater: not all ranks came within `startup_timeout_minutes`.
    """
    environment.prepare_environment()
    index = environment.local_rank() if local_rank is None else local_rank
    device = _choose_device(index)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _meet(backend, device, settings.startup_timeout_minutes)
    join_deepspeed()
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), index, device)
    console.info(_description(ranks, backend, settings))
    if ranks.world_size > 1:
        for line in describe_placement(ranks):
            console.info(line)
    return ranks


def stop_ranks() -> None:
    """Leave the process group and undo what DeepSpeed changed in this process. Does nothing without a group."""
    if deepspeed_comm.cdb is not None:
        if dist.is_initialized():
            deepspeed_comm.destroy_process_group()
        deepspeed_comm.cdb = None
    elif dist.is_initialized():
        dist.destroy_process_group()
    original_linear = getattr(ZeroInitBase, "linear_bk", None)
    if original_linear is not None:
        torch.nn.functional.linear = original_linear


def join_deepspeed() -> None:
    """Make DeepSpeed use the process group that exists, without compiling anything."""
    deepspeed.ops.__compatible_ops__ = UNUSED_OPS
    # DeepSpeed calls functions that torch has renamed; torch says so at every collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if deepspeed_comm.cdb is None or not deepspeed_comm.cdb.is_initialized():
        deepspeed_comm.cdb = None
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def limit_waiting(minutes: float) -> None:
    """Set the collectives' timeout of every process group of this process, DeepSpeed's own included."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def _choose_device(local_rank: int) -> torch.device:
    """This rank's device. Where the scheduler shows each rank its own GPU only, that is number 0 for all of them."""
    name = get_accelerator().device_name()
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes this for the device
    torch.cuda.set_device(device)
    return device


def _meet(backend: str, device: torch.device, minutes: float) -> None:
    if not environment.single_node() and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR is not set: give all ranks the address of the first machine in it")
    try:
        dist.init_process_group(
            backend,
            init_method=environment.meeting_point(),
            rank=environment.rank(),
            world_size=environment.world_size(),
            timeout=timedelta(minutes=minutes),
            device_id=device if device.type == "cuda" and environment.world_size() > 1 else None,
        )
    except dist.DistError as error:
        where = environment.meeting_point()
        raise RetryLater(
            f"not all of {environment.world_size()} ranks came to {where} within {minutes:g} min "
            f"(engine.startup_timeout_minutes): {error}"
        ) from error


def _description(ranks: Ranks, backend: str, settings: EngineConfig) -> str:
    where = "on this machine" if environment.single_node() else f"around {environment.meeting_point()}"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    else:
        threads = torch.get_num_threads()
        device = f"CPU with {threads} thread{'s' if threads != 1 else ''} each"
    count = f"{ranks.world_size} rank{'s' if ranks.world_size != 1 else ''}"
    return f"{count} {where}, {device}, {backend}; hang timeout {settings.step_timeout_minutes:g} min"
