"""What each new block of a model contributes: how much the loss rises when the block alone is bypassed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from llamapro import console
from llamapro.evaluation.bypass import loss_difference
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.results import Contribution
from llamapro.evaluation.variants import AS_IT_IS, Variants
from llamapro.expansion.lineage import added_blocks
from llamapro.expansion.record import read_record
from llamapro.modeling.model import LanguageModel


def measure_contributions(
    folder: Path, name: str, sets: Sequence[TextSet], settings: Settings, store: Path
) -> dict[str, dict[str, Contribution]]:
    """The loss increase without each added block, by block and text; empty for a model that was never expanded.

    One pass over the texts for each block, and one for the whole model.

    Args:
        name: how to call the model; store: the folder that scores are kept in.
    """
    record = read_record(folder)
    blocks = added_blocks(record) if record else ()
    if not blocks:
        return {}
    variants = Variants(folder, settings, store)
    found: dict[str, dict[str, Contribution]] = {str(block): {} for block in blocks}
    with console.progress(f"blocks of {name}", len(blocks) * len(sets), "passes") as advance:
        for text in sets:
            whole = variants.score(text, AS_IT_IS, _without(()))
            for block in blocks:
                increase = loss_difference(variants.score(text, f"without block {block}", _without((block,))), whole)
                found[str(block)][text.name] = Contribution(increase=increase.value, half_width=increase.half_width)
                advance(1)
    return found


def _without(blocks: tuple[int, ...]) -> Callable[[LanguageModel], AbstractContextManager[None]]:
    return lambda model: model.bypassed(blocks)
