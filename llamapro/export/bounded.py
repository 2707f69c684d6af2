"""An export at the largest strength of its new blocks that keeps a bound on general text, as measured."""

from collections.abc import Sequence
from pathlib import Path

from llamapro.errors import UserError
from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.strength_bound import BoundedStrength, find_strength
from llamapro.expansion.record import read_record
from llamapro.export.export import ExportSummary, export
from llamapro.export.strength import StrengthRequest
from llamapro.files.atomic import remove_tree, require_free_target, staging_path


def export_within_bound(
    source: Path,
    out: Path,
    probes: Sequence[TextSet],
    settings: Settings,
    bound: float,
    *,
    model: Path | None = None,
    dtype: str = "keep",
    delta: bool = False,
    overwrite: bool = False,
) -> tuple[ExportSummary, BoundedStrength]:
    """Export a run or checkpoint at the strength that `find_strength` finds; the disk must hold the model twice.

    Args:
        bound: on the increase of each probe's loss, at the upper end of its 95 % interval, as a fraction of the base's.

    Raises:
        UserError: as `export`, or the model has no strengths.
        CheckFailed: as `export`, or no strength above 0 keeps the bound.
    """
    require_free_target(out, overwrite=overwrite)
    whole = staging_path(out)
    export(source, whole, model=model, dtype=dtype)
    try:
        record = read_record(whole)
        if record is None:
            raise UserError(f"{source}: its model was never expanded, so there is no strength to find")
        found = find_strength(whole, record, probes, settings, bound)
    finally:
        remove_tree(whole)
    request = StrengthRequest(found.strength, reason=bound_text(found))
    summary = export(source, out, model=model, dtype=dtype, delta=delta, overwrite=overwrite, strength=request)
    return summary, found


def bound_text(found: BoundedStrength) -> str:
    """What was measured, in words."""
    probes = [
        f"{name} {_percent(increase)}, and {_percent(found.unseen[name])} on rows that had no part in the choice"
        for name, increase in found.measured.items()
    ]
    return (
        f"the largest at which the loss on general text is at most {found.bound:.2%} above the base's, with 95 % "
        f"confidence; measured: {'; '.join(probes)}"
    )


def _percent(estimate: Estimate) -> str:
    width = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.2f}"
    return f"{100 * estimate.value:+.2f}{width} %"
