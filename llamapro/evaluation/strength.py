"""The strength dial: new blocks at any strength between 0, which is exactly the base, and 1, the trained model.

New blocks write to the residual stream through their declared tensors alone. Scaling the way of those from the filling
that made them the identity (zero, or -1 where a norm adds 1) to what training made of them moves the model continuously
from its base to itself, bit for bit at both ends. A model at a strength is a plain model of the same shapes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llamapro import console
from llamapro.evaluation.measure import TextSet, program_versions, set_result
from llamapro.evaluation.results import INTERVALS, Change, SetResult
from llamapro.evaluation.stored import Stored
from llamapro.evaluation.text import TextScore, relative_change
from llamapro.evaluation.variants import AS_IT_IS, Variants
from llamapro.expansion.families import Family, family_named
from llamapro.expansion.record import ExpansionRecord
from llamapro.expansion.strength import Strengths, blocks_above_base, dialled_tensor
from llamapro.modeling.model import LanguageModel

STRENGTHS_NAME = "strengths.json"
FORMAT_VERSION = 1
# Strengths are tried from 1 downwards in this many steps, then the last one is halved this often.
COARSE_STEPS = 8
HALVINGS = 5


def dialled(values: torch.Tensor, filling: float, strength: float) -> torch.Tensor:
    """A declared tensor at a strength: filling + strength · (values - filling), computed in float32.

    Every operation is rounded by itself, so that files and models in memory come to the same bits.

    Args:
        values: what training made of it.
        filling: what it holds at strength 0.
    """
    if strength == 1:
        return values
    return ((values.float() - filling) * strength + filling).to(values.dtype)


@dataclass(frozen=True)
class _Dialled:
    """A declared tensor in a model's memory: `live` is a view of it, `trained` a copy from before anything changed."""

    block: int
    filling: float
    live: torch.Tensor
    trained: torch.Tensor


class StrengthDial:
    """Turns the blocks above the base of a model in memory.

    Attributes:
        blocks: that it turns.
    """

    def __init__(self, model: LanguageModel, record: ExpansionRecord) -> None:
        """Raises:
        UserError: no strength of the blocks leads to a base.
        """
        self.blocks = blocks_above_base(record)
        self._tensors = list(_declared(model, family_named(record.family), self.blocks))

    @contextmanager
    def at(self, strength: float | Strengths) -> Iterator[None]:
        """While it lasts, the blocks have this strength, or each its own."""
        strengths = strength if isinstance(strength, Mapping) else dict.fromkeys(self.blocks, strength)
        self._turn(strengths)
        try:
            yield
        finally:
            self._turn({})

    def _turn(self, strengths: Strengths) -> None:
        with torch.no_grad():
            for tensor in self._tensors:
                tensor.live.copy_(dialled(tensor.trained, tensor.filling, strengths.get(tensor.block, 1.0)))


def _declared(model: LanguageModel, family: Family, blocks: Sequence[int]) -> Iterator[_Dialled]:
    for name, parameter in model.hf.named_parameters():
        flat = parameter.data.view(-1)
        for cut in model.stored.cuts(name, 0, flat.numel()):
            found = dialled_tensor(family, cut.part.name)
            if found is not None and found[0] in blocks:
                live = flat[cut.low : cut.high]
                yield _Dialled(*found, live, live.clone())


class StrengthPoint(Stored):
    """A model at one strength: its scores by text, and by which fraction its losses are above those at strength 0."""

    strength: float
    sets: dict[str, SetResult]
    changes: dict[str, Change]


class StrengthCurve(Stored):
    """The whole of strengths.json.

    Attributes:
        model: as the user named it, `digest` of its tensors and configuration.
        blocks: that have the strengths.
        general: the text that stands for what must be kept.
        points: by rising strength, 0 among them.
    """

    format_version: int = FORMAT_VERSION
    intervals: str = INTERVALS
    settings: dict[str, Any]
    versions: dict[str, str]
    model: str
    digest: str
    blocks: tuple[int, ...]
    general: str
    points: tuple[StrengthPoint, ...]


class DialledModel:
    """A model folder that is scored at strengths.

    Attributes:
        blocks: that are turned.
    """

    def __init__(self, variants: Variants, record: ExpansionRecord) -> None:
        """Raises:
        UserError: no strength of the blocks leads to a base.
        """
        self.blocks = blocks_above_base(record)
        self.variants = variants
        self._record = record

    @cached_property
    def _dial(self) -> StrengthDial:
        return StrengthDial(self.variants.model, self._record)

    def score(self, text: TextSet, strength: float) -> TextScore:
        """The score on a text with all blocks at this strength."""
        if strength == 1:
            return self.variants.score(text, AS_IT_IS, lambda _: nullcontext())
        blocks = ",".join(map(str, self.blocks))
        return self.variants.score(text, f"blocks {blocks} at {strength!r}", lambda _: self._dial.at(strength))


def measure_strengths(
    model: DialledModel, name: str, sets: Sequence[TextSet], strengths: Sequence[float], general: str
) -> StrengthCurve:
    """Score a model at strengths, and at 0 to compare with.

    Args:
        general: the text, one of at least two, that stands for what must be kept.
    """
    chosen = sorted({0.0, *strengths})
    points = []
    with console.progress(f"strengths of {name}", len(chosen) * len(sets), "texts") as advance:
        base: dict[str, TextScore] = {}
        for strength in chosen:
            scores = {}
            for text in sets:
                scores[text.name] = model.score(text, strength)
                advance(1)
            base = base or scores
            points.append(_point(strength, sets, scores, base))
    settings = model.variants.settings
    return StrengthCurve(
        settings=settings.as_stored(),
        versions=program_versions(),
        model=name,
        digest=model.variants.digest,
        blocks=model.blocks,
        general=general,
        points=tuple(points),
    )


def _point(
    strength: float, sets: Sequence[TextSet], scores: Mapping[str, TextScore], base: Mapping[str, TextScore]
) -> StrengthPoint:
    changes = {}
    for name, score in scores.items():
        estimate = relative_change(score, base[name])
        changes[name] = Change(fraction=estimate.value, half_width=estimate.half_width)
    return StrengthPoint(
        strength=strength, sets={text.name: set_result(text, scores[text.name]) for text in sets}, changes=changes
    )


def largest_within(increase: Callable[[float], float], bound: float) -> float:
    """The largest strength, to a 256th, whose increase is within a bound.

    Losses often fall a little before they rise, so strengths are tried from 1 downwards first; then the step between
    the first that is within and the last that is not is halved again and again. 0 is within any bound.

    Args:
        increase: of the loss at a strength, as a fraction of that at strength 0.
    """
    high = None
    for step in range(COARSE_STEPS, -1, -1):
        low = step / COARSE_STEPS
        if low == 0 or increase(low) <= bound:
            break
        high = low
    if high is None:
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if increase(middle) <= bound else (low, middle)
    return low
