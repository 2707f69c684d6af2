"""What a run ran on: versions, hardware and the code's commit, as JSON. No environment variable, so no secret."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import llamapro
from llamapro.ranks import Ranks

PACKAGES = ("torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Versions and hardware of this start, for environment.json and the report."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "llamapro": llamapro.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "host": platform.node(),
        "system": platform.platform(),
        "device": device,
        "world_size": ranks.world_size,
        "cores": psutil.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this code runs from; None for an installed copy."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
