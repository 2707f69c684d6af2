"""The report page: facts and plots put into one HTML file that needs nothing else, not even scripts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llamapro.files.atomic import write_atomic
from llamapro.report.collect import Facts, collect
from llamapro.report.plots import draw
from llamapro.run_folder import RunFolder

TEMPLATE = "report.html"


@dataclass(frozen=True)
class _DrawnPlot:
    title: str
    svg: Markup


def write_report(run: Path) -> Path:
    """Write RUN/report.html; returns its path.

    Raises:
        UserError: the folder is no run.
    """
    path = RunFolder(run).report_file
    write_atomic(path, render(collect(run)))
    return path


def render(facts: Facts) -> str:
    """The page as HTML. Everything read from files is escaped; only the plots, drawn here, are markup."""
    environment = Environment(
        loader=PackageLoader("llamapro.report"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    drawn = [_DrawnPlot(plot.title, Markup(draw(plot))) for plot in facts.plots]
    page: dict[str, Any] = vars(facts) | {"plots": drawn}
    return environment.get_template(TEMPLATE).render(page=page)
