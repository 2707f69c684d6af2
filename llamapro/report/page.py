"""The report page: facts and plots put into one HTML file that needs nothing else, not even scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llamapro.errors import UserError
from llamapro.files.atomic import write_atomic
from llamapro.report.collect import collect, read_run
from llamapro.report.facts import Facts, SampleGroup
from llamapro.report.overlay import overlay, read_runs
from llamapro.report.plots import LINES, draw
from llamapro.run_folder import RunFolder

TEMPLATE = "report.html"
OVERLAY_NAME = "comparison.html"


@dataclass(frozen=True)
class _DrawnPlot:
    title: str
    svg: Markup


def write_report(
    run: Path, output: Path | None = None, *, evaluation: Path | None = None, samples: Sequence[SampleGroup] = ()
) -> Path:
    """Write the page of one run; returns its path, RUN/report.html unless `output` names another.

    Args:
        evaluation: folder of `llamapro evaluate`; None: RUN/evaluation, where there is one.

    Raises:
        UserError: the folder is no run, or `output` can't be written.
    """
    facts = collect(read_run(run, evaluation), samples)
    return _write(output or RunFolder(run).report_file, facts)


def write_overlay(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page of several runs; returns its path, `comparison.html` of the first unless `output` names another.

    Raises:
        UserError: a folder is no run, or one is named twice, or `output` can't be written.
    """
    return _write(output or runs[0] / OVERLAY_NAME, overlay(read_runs(runs)))


def render(facts: Facts) -> str:
    """The page as HTML. Everything read from files is escaped; only the plots, drawn here, are markup."""
    environment = Environment(
        loader=PackageLoader("llamapro.report"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    drawn = [_DrawnPlot(plot.title, Markup(draw(plot))) for plot in facts.plots]
    page: dict[str, Any] = vars(facts) | {"plots": drawn}
    return environment.get_template(TEMPLATE).render(page=page, colors=len(LINES))


def _write(path: Path, facts: Facts) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, render(facts))
    except OSError as error:
        raise UserError(f"the report can't be written to {path}: {error}; name another file with --output") from error
    return path
