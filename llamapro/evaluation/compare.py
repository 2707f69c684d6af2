"""A model's scores, and where there is one its base's, put side by side and into results.json."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llamapro.evaluation.contribution import measure_contributions
from llamapro.evaluation.intervals import Estimate
from llamapro.evaluation.measure import (
    Measured,
    OpenScorer,
    Settings,
    TextSet,
    measure,
    program_versions,
    scorer_alone,
)
from llamapro.evaluation.results import Change, Contribution, Results, TokenShift, write_results
from llamapro.evaluation.shift import measure_shifts
from llamapro.evaluation.text import relative_change
from llamapro.evaluation.verdict import verdict


def evaluate_model(
    model: tuple[str, Path],
    base: tuple[str, Path] | None,
    sets: Sequence[TextSet],
    settings: Settings,
    output: Path,
    detail_sequences: int = 0,
    open_scorer: OpenScorer = scorer_alone,
) -> Results:
    """Measure a model, and its base on the same rows, and write `output`/results.json.

    Args:
        model: how the user named it, and its folder.
        base: the same for what it is compared with.
        detail_sequences: rows per set, at most, on which tokens are compared and blocks are bypassed one by one; 0:
            neither is done.
        open_scorer: loads a model that is scored.
    """
    measured = measure(model[1], model[0], sets, settings, output, open_scorer)
    against = measure(base[1], base[0], sets, settings, output, open_scorer) if base else None
    contributions: dict[str, dict[str, Contribution]] = {}
    shifts: dict[str, TokenShift] = {}
    if base and detail_sequences:
        fewer = replace(settings, sequences=detail_sequences)
        contributions = measure_contributions(model[1], model[0], sets, fewer, output)
        shifts = measure_shifts(model[1], base[1], sets, fewer, output)
    changes = _changes(measured, against) if against else {}
    results = Results(
        settings=settings.as_stored(),
        versions=program_versions(),
        model=measured.result,
        base=against.result if against else None,
        changes={name: Change(fraction=change.value, half_width=change.half_width) for name, change in changes.items()},
        verdicts={name: verdict(change, higher_is_better=False) for name, change in changes.items()},
        detail_sequences=detail_sequences if base else 0,
        contributions=contributions,
        shifts=shifts,
    )
    write_results(output, results)
    return results


def _changes(model: Measured, base: Measured) -> dict[str, Estimate]:
    return {name: relative_change(score, base.scores[name]) for name, score in model.scores.items()}
