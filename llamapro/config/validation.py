"""Section `validation`: held-out text, scored while training."""

from typing import Literal

from llamapro.config.base import Count, FilePath, Name, Section


class ValidationConfig(Section):
    """Held-out text, scored while training; always before the first step and after the last one too."""

    every_steps: Count = 250
    """Optimizer steps between validations. The number of steps of the run, or more: only before and after."""

    sequences: Count = 256
    """Sequences per set, the same ones every time; fewer when the held-out split is smaller."""

    sets: Literal["auto"] | dict[Name, FilePath] = "auto"
    """Validation sets: auto (every source's held-out split, under the source's name), or dataset folders by name, whose
    held-out splits are used. {} switches validation off."""
