"""A model's scores, and where there is one its base's, put side by side and into results.json."""

from collections.abc import Sequence
from pathlib import Path

from llamapro.evaluation.measure import Measured, Settings, TextSet, measure, program_versions
from llamapro.evaluation.results import Change, Results, write_results
from llamapro.evaluation.text import relative_change


def evaluate_model(
    model: tuple[str, Path],
    base: tuple[str, Path] | None,
    sets: Sequence[TextSet],
    settings: Settings,
    output: Path,
) -> Results:
    """Measure a model, and its base on the same rows, and write `output`/results.json.

    Args:
        model: how the user named it, and its folder.
        base: the same for what it is compared with.
    """
    measured = measure(model[1], model[0], sets, settings, output)
    against = measure(base[1], base[0], sets, settings, output) if base else None
    results = Results(
        settings={
            "sequence_length": settings.sequence_length,
            "sequences": settings.sequences,
            "precision": settings.precision,
            "device": settings.device.type,
        },
        versions=program_versions(),
        model=measured.result,
        base=against.result if against else None,
        changes=_changes(measured, against) if against else {},
    )
    write_results(output, results)
    return results


def _changes(model: Measured, base: Measured) -> dict[str, Change]:
    changes = {}
    for name, score in model.scores.items():
        estimate = relative_change(score, base.scores[name])
        changes[name] = Change(fraction=estimate.value, half_width=estimate.half_width)
    return changes
