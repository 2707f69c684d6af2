"""torch.compile of blocks and of the loss, where it pays.

Blocks of one kind share a graph: what differs between them are the tensors they are given. This also holds where
weights are cut over ranks (ZeRO-3), because they are fetched for a whole block before it begins; a compiled block then
refers to its parameters instead of keeping their data (`blocks`), or every block would stay whole until its backward
pass.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from llamapro.errors import UserError
from llamapro.modeling.blocks import without_kind
from llamapro.modeling.loss import chunk_loss
from llamapro.modeling.model import LanguageModel

BLOCKS, NOTHING = "blocks", "nothing"
# A graph for each kind of block, with and without an input gradient, for each kind of layer that a family mixes.
_MOST_GRAPHS: Final = 64


@dataclass(frozen=True)
class CompileChoice:
    """What is compiled, and why.

    Attributes:
        parts: blocks or nothing.
    """

    parts: str
    reason: str

    def __str__(self) -> str:
        return f"{self.parts} ({self.reason})"


def choose_compile(requested: str, model: LanguageModel, device: torch.device) -> CompileChoice:
    """What to compile of a model.

    Args:
        requested: `engine.compile`: auto, on or off.

    Raises:
        UserError: it is asked for and can't be done.
    """
    if requested == "off":
        return CompileChoice(NOTHING, "asked for: off")
    obstacle = compiler_obstacle(device) or _unfit(model)
    if obstacle and requested == "on":
        raise UserError(f"engine.compile: on can't be done: {obstacle}; use auto")
    if obstacle:
        return CompileChoice(NOTHING, obstacle)
    if requested == "auto" and device.type == "cpu":
        return CompileChoice(NOTHING, "on CPUs compiling takes minutes; engine.compile: on pays in runs of hours")
    return CompileChoice(BLOCKS, "each kind of block, and the loss")


def compile_model(model: LanguageModel, choice: CompileChoice) -> None:
    """Compile what was chosen, at its first use; the model computes the same but for rounding."""
    model.compiled = str(choice)
    if choice.parts == NOTHING:
        return
    # The limit belongs to the process; beyond it torch would go on uncompiled and say so in a warning only.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    model.head.chunk_loss = torch.compile(chunk_loss, dynamic=True)
    _compile_blocks(model.blocks)


def _compile_blocks(blocks: nn.ModuleList) -> None:
    compiled: dict[type, Callable[..., Any]] = {}
    for block in blocks:
        own = without_kind(type(block))
        if own not in compiled:
            compiled[own] = torch.compile(own.forward, dynamic=False)
        block.compiled = compiled[own]  # type: ignore[assignment]


def compiler_obstacle(device: torch.device) -> str:
    """What is missing to compile for a device; empty when nothing is."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def _unfit(model: LanguageModel) -> str:
    """Why a model's blocks don't make one graph; empty when they do."""
    if model.masks is not None:
        return model.attention.reason
    for name, parameter in model.blocks.named_parameters():
        if parameter.ndim > 2 or ".experts." in name:
            return f"{type(model.hf).__name__} chooses experts by value"
    return ""
