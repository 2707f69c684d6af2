"""What `evaluate --compare` says of where a model differs from its base: token shift, and each added block's part."""

from llamapro import console
from llamapro.evaluation.results import Contribution, Results, TokenShift


def show_details(results: Results) -> None:
    """Print what was measured of it."""
    if results.shifts:
        title = "most likely next token against the base: same, among the base's next two, or another"
        columns = ("text", "unshifted", "marginal", "shifted", "places")
        console.table(title, columns, [_shift_row(name, shift) for name, shift in results.shifts.items()])
    if results.contributions:
        title = "contribution of each added block: increase of the loss without it, nats/token, intervals 95 %"
        rows = [
            (f"block {block}", *(_contribution(found[name]) for name in results.shifts))
            for block, found in results.contributions.items()
        ]
        console.table(title, ("without", *results.shifts), rows)


def _shift_row(name: str, shift: TokenShift) -> tuple[str, ...]:
    shares = [f"{count / shift.positions:.2%}" for count in (shift.unshifted, shift.marginal, shift.shifted)]
    return (name, *shares, f"{shift.positions:,}")


def _contribution(found: Contribution) -> str:
    width = "" if found.half_width is None else f" ± {found.half_width:.4f}"
    return f"{found.increase:+.4f}{width}"
