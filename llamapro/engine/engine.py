"""One training step on DeepSpeed ZeRO 1, 2 or 3, exact in its scaling, with nothing skipped silently.

The mean loss of a step is the sum over its target tokens on all ranks divided by their global number, so every
micro-batch is scaled by that number, which is known before the step begins. DeepSpeed averages over ranks; that is
undone on the float32 gradients and not by scaling the loss, which would round the bf16 backward pass in another way at
each world size.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import deepspeed  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger  # type: ignore[import-untyped]
from torch import nn

from llamapro.config.root import RunConfig
from llamapro.engine.adamw import AdamW, clip_factor, decay_groups
from llamapro.engine.configuration import deepspeed_configuration
from llamapro.engine.partition import fetch_by_block, stage3_partitioner
from llamapro.engine.start import WATCHDOG_MARGIN_MINUTES, join_deepspeed, limit_waiting
from llamapro.engine.state import (
    Fragment,
    NamedState,
    ReadSlice,
    frozen_slices,
    of_stored_tensors,
    reader_of_parameters,
)
from llamapro.modeling.model import LanguageModel, LossOutput
from llamapro.modeling.replay import Replay
from llamapro.ranks import Ranks

Veto = Callable[[float], bool]
"""veto(gradient_norm): whether this update must be skipped. It must answer the same on every rank."""


class StepResult(NamedTuple):
    """What an optimizer step did, the same on every rank.

    Attributes:
        gradient_norm: of the whole gradient before clipping; inf when any element was not finite.
        skipped: nothing was updated: the veto said so, or the gradient was not finite.
    """

    gradient_norm: float
    skipped: bool


class Engine:
    """A model under training. Made by `start`; every method is called on all ranks alike."""

    def __init__(
        self,
        deepspeed_engine: Any,
        optimizer: AdamW,
        model: LanguageModel,
        state: NamedState,
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        self._deepspeed = deepspeed_engine
        self._optimizer = optimizer
        self._model = model
        self._state = state
        self._step_limit_minutes = config.engine.step_timeout_minutes + WATCHDOG_MARGIN_MINUTES
        self._clip_norm = config.optimizer.gradient_clip_norm
        self._ranks = ranks
        self._accumulation_steps: int = deepspeed_engine.gradient_accumulation_steps()
        self._micro_step = 0
        self._started = False

    @classmethod
    def start(
        cls,
        model: LanguageModel,
        trainable: Sequence[tuple[str, nn.Parameter]],
        config: RunConfig,
        ranks: Ranks,
        zero_stage: int,
        micro_sequences: int,
        accumulation_steps: int,
    ) -> Engine:
        """Put a built model under DeepSpeed; collective.

        Args:
            model: as `build_model` made it: already cut into parts at stage 3 (see `partitioner`).
            trainable: name in the Hugging Face model and parameter of everything that learns; only these reach the
                optimizer.
            micro_sequences: rows per rank in one forward and backward pass.
            accumulation_steps: micro-batches per optimizer step.
        """
        join_deepspeed()
        parameters = [parameter for _, parameter in trainable]
        fused = ranks.device.type == "cuda" and config.engine.offload == "none"
        optimizer = AdamW(decay_groups(parameters, config.optimizer), config.optimizer, fused=fused)
        if zero_stage == 3:
            fetch_by_block(model.blocks, model.trainable.lowest)
        configuration = deepspeed_configuration(
            config,
            zero_stage=zero_stage,
            world_size=ranks.world_size,
            micro_sequences=micro_sequences,
            accumulation_steps=accumulation_steps,
        )
        with _only_errors_logged():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=parameters,
                config=configuration,
                dist_init_required=False,
            )
        limit_waiting(config.engine.startup_timeout_minutes)
        state = NamedState(engine.optimizer, optimizer, trainable, zero_stage)
        return cls(engine, optimizer, model, state, config, ranks)

    @staticmethod
    def partitioner(config: RunConfig, zero_stage: int) -> Callable[[nn.Module], None] | None:
        """What `build_model` needs to cut each filled module over the ranks; None below stage 3."""
        if zero_stage != 3:
            return None
        configuration = deepspeed_configuration(
            config, zero_stage=zero_stage, world_size=dist.get_world_size(), micro_sequences=1, accumulation_steps=1
        )
        return stage3_partitioner(configuration)

    def forward_loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        boundaries: torch.Tensor | None = None,
        replay: Replay | None = None,
    ) -> LossOutput:
        """The loss of one micro-batch, as `LanguageModel.forward` takes it, on the rank's device.

        With `replay` on all ranks or on none.
        """
        output: LossOutput = self._deepspeed(input_ids, labels, position_ids, boundaries, replay)
        return output

    def backward(self, loss_sum: torch.Tensor, global_valid_tokens: int) -> None:
        """Add one micro-batch's part to the gradient of the step's mean loss.

        Args:
            loss_sum: this micro-batch's sum of token losses.
            global_valid_tokens: target tokens of the whole step, over all micro-batches and ranks.
        """
        assert self._micro_step < self._accumulation_steps, "more micro-batches than accumulation steps"
        self._micro_step += 1
        self._deepspeed.set_gradient_accumulation_boundary(self._micro_step == self._accumulation_steps)
        self._deepspeed.backward(loss_sum / max(1, global_valid_tokens), scale_wrt_gas=False)

    def step(self, learning_rate: float, veto: Veto | None = None) -> StepResult:
        """Clip and apply the accumulated gradient, unless it is not finite or vetoed.

        The veto is asked exactly once, with inf for a gradient that is not finite: that one is skipped in any case.
        """
        assert self._micro_step == self._accumulation_steps, "a step before its last micro-batch"
        decisions: list[StepResult] = []
        world_size = self._ranks.world_size

        def gradient_factor() -> float | None:
            if not decisions:
                norm = world_size * float(self._deepspeed.optimizer._global_grad_norm)
                decisions.append(StepResult(norm, veto is not None and veto(norm)))
            norm, skipped = decisions[0]
            return None if skipped else world_size * clip_factor(norm, self._clip_norm)

        self._optimizer.set_learning_rate(learning_rate)
        self._optimizer.gradient_factor = gradient_factor
        self._deepspeed.step()
        self._micro_step = 0
        self._tighten_timeout()
        if decisions:
            return decisions[0]
        if veto is not None:
            veto(math.inf)
        return StepResult(math.inf, skipped=True)

    def drop_gradients(self) -> None:
        """Forget the micro-batches of an unfinished step: the next one begins anew."""
        _forget_gradients(self._deepspeed.optimizer)
        self._micro_step = 0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts, `forward_loss` computes no gradients and dropout is off. Only between steps."""
        assert self._micro_step == 0, "evaluation in the middle of a step"
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    @property
    def model(self) -> LanguageModel:
        """The model under training."""
        return self._model

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far; skipped steps don't count."""
        return self._optimizer.steps

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices; over all ranks every element of every stored tensor that learns occurs exactly once."""
        for fragment in self._state.fragments():
            yield from of_stored_tensors(fragment, self._model.stored)

    def load(self, read: ReadSlice, optimizer_steps: int) -> None:
        """Replace float32 weights, optimizer state and the low-precision copies; collective."""
        self._state.load(reader_of_parameters(read, self._model.stored), optimizer_steps)

    def frozen_slices(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """This rank's share of what is frozen: (name of the stored tensor, first element, 1-D values)."""
        for name, start, values in frozen_slices(self._model.frozen_tensors(), self._ranks):
            for cut in self._model.stored.cuts(name, start, values.numel()):
                yield cut.part.name, cut.start, values[cut.low : cut.high]

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model."""
        self._deepspeed.destroy()

    def _tighten_timeout(self) -> None:
        """From the first finished step on ranks wait for each other only as long as a step may take."""
        if not self._started:
            limit_waiting(self._step_limit_minutes)
            self._started = True


def _forget_gradients(zero_optimizer: Any) -> None:
    """Reset the accumulation of each of DeepSpeed's three optimizers.

    `zero_grad` does all of it for the bf16 optimizer of stage 1 and for stage 3; stages 1 and 2 also keep averaged
    gradients and a count of micro-steps.
    """
    zero_optimizer.zero_grad(set_to_none=True)
    if hasattr(zero_optimizer, "all_grad_tensors"):
        zero_optimizer._release_preflattened_grad_buffers()
        for group in zero_optimizer.averaged_gradients:
            zero_optimizer.averaged_gradients[group] = None
            zero_optimizer.all_grad_tensors[group] = None
        zero_optimizer.micro_step_id = -1
        zero_optimizer._offload_accumulated_param_ids = set()


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """On every start DeepSpeed warns about our optimizer, and its bf16 optimizer prints the memory in use."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        deepspeed_logger.setLevel(level)
