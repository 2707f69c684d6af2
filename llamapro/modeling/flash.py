"""Which FlashAttention computes documents of variable length on a CUDA device: FA4, FA3, or torch's own, which is FA2.

torch has an attention over many documents at once, and a registry through which packages put newer kernels in its
place for the whole process. The package flash-attn itself (FA2) has the kernels that torch has, so it isn't asked for.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.attention

OWN_FLASH: Final = "FA2"


@dataclass(frozen=True)
class FlashPackage:
    """A package of kernels.

    Attributes:
        name: in torch's registry.
        module: what must be importable.
        capabilities: major compute capabilities that it has kernels for.
        largest_head: width of the largest head.
    """

    name: str
    module: str
    capabilities: tuple[int, ...]
    largest_head: int

    def obstacle(self, capability: int, head_dim: int) -> str:
        """Why it can't be used; empty when it can."""
        if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            return f"torch {torch.__version__} has no registry for it"
        if capability not in self.capabilities:
            return f"has no kernels for compute capability {capability}"
        if head_dim > self.largest_head:
            return f"has heads of at most {self.largest_head}"
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"not installed ({error})"
        return ""


PACKAGES: Final = (
    FlashPackage("FA4", "flash_attn.cute.interface", (9, 10), 128),
    FlashPackage("FA3", "flash_attn_interface", (9,), 256),
)


@dataclass(frozen=True)
class Flash:
    """The FlashAttention in use, and why not a newer one."""

    name: str
    reason: str


def newest_flash(capability: int, head_dim: int, packages: Sequence[FlashPackage] = PACKAGES) -> Flash:
    """The newest FlashAttention that can run.

    Args:
        capability: major compute capability of the device.
        head_dim: width of the model's heads.
    """
    passed: list[str] = []
    for package in packages:
        obstacle = package.obstacle(capability, head_dim)
        if not obstacle:
            return Flash(package.name, "; ".join([f"{package.module} is installed", *passed]))
        passed.append(f"{package.name} {obstacle}")
    return Flash(OWN_FLASH, "; ".join(["torch's own", *passed]))


def activate(flash: Flash) -> None:
    """Put it behind torch's attention, for the whole process."""
    if flash.name != OWN_FLASH:
        torch.nn.attention.activate_flash_attention_impl(flash.name)
