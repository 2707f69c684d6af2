"""What a device can't do of what is asked for by name: kernels of attention, compiling."""

import torch

from llamapro.config.engine import EngineConfig
from llamapro.modeling.attention import AttentionNeeds, kernel_obstacle
from llamapro.modeling.compiled import compiler_obstacle
from llamapro.training.findings import Findings

# What the model itself stands in the way of is found out when it is built.
_ANY_MODEL = AttentionNeeds(head_dim=1)


def check_kernels(engine: EngineConfig, device: torch.device, findings: Findings) -> None:
    """Check what can be checked before the model is built."""
    if engine.compile == "on" and (obstacle := compiler_obstacle(device)):
        findings.problem("engine.compile", f"on can't be done: {obstacle}; use auto")
    if engine.attention != "auto":
        dtype = torch.float32 if engine.precision == "float32" else torch.bfloat16
        if obstacle := kernel_obstacle(engine.attention, device, dtype, _ANY_MODEL):
            findings.problem("engine.attention", f"{engine.attention} can't run: {obstacle}; use auto")
