"""What DeepSpeed's settings say about memory: how much is communicated, and kept gathered, at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llamapro.config.strategies import strategy

NO_OVERLAY: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Buffers:
    """Sizes in elements.

    Attributes:
        reduced: gradients that are reduced over ranks at once.
        gathered: parameters that stage 3 holds whole at once; 0 below it.
    """

    reduced: int
    gathered: int = 0

    @classmethod
    def of(cls, zero_stage: int, overlay: Mapping[str, Any] = NO_OVERLAY) -> Self:
        """As `ds_configs/zeroN.json` says, and what is laid over it.

        Args:
            overlay: the content of `engine.deepspeed`.
        """
        settings = strategy(zero_stage)["zero_optimization"] | overlay.get("zero_optimization", {})
        gathered = int(settings["stage3_max_live_parameters"]) if zero_stage == 3 else 0
        return cls(int(settings["reduce_bucket_size"]), gathered)
