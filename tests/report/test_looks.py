"""The pages as a browser shows them: drawn, dark where that is asked for, within the window, printable."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from llamapro.report.facts import Sample, SampleGroup
from llamapro.report.page import write_overlay, write_report
from tests.report.test_overlay import comparable_runs
from tests.support.browser import Browser
from tests.support.exports import make_run

WIDE, NARROW = 1200, 390
Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser.find(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one run, with the widest things that a page can hold, and that of two."""
    folder = tmp_path_factory.mktemp("pages")
    tiny = make_run(folder)
    (tiny.folder / "environment.json").write_text('{"device": "NVIDIA H100 80GB HBM3", "commit": "%s"}' % ("a" * 200))
    failed = {"event": "save failed", "step": 3, "reason": "/very/long" * 30, "in_a_row": 1}
    with (tiny.folder / "metrics.jsonl").open("ab") as file:
        file.write(orjson.dumps(failed) + b"\n")
    samples = [SampleGroup("Seen", (Sample("law", "row 1", (("word" * 200, False), ("answer", True))),))]
    one = write_report(tiny.folder, folder / "one.html", samples=samples)
    return {"one": one, "overlay": write_overlay(comparable_runs(folder / "several"), folder / "two.html")}


def color(page: Path, name: str, *, dark: bool) -> tuple[int, ...]:
    """The value of a colour variable: the first definition is the light one, the second the dark one."""
    values = re.findall(rf"--{name}: #([0-9a-f]{{6}})", page.read_text())
    text = values[int(dark)]
    return tuple(int(text[place : place + 2], 16) for place in (0, 2, 4))


def near(pixels: Pixels, wanted: tuple[int, ...]) -> int:
    """How many pixels have nearly this colour."""
    return int((np.abs(pixels - np.array(wanted)).max(axis=-1) <= 6).sum())


@pytest.mark.parametrize("name", ["one", "overlay"])
@pytest.mark.parametrize("dark", [False, True])
def test_paper_ink_and_curves_have_the_colours_of_their_theme(
    name: str, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    page = pages[name]
    pixels = browser.screenshot(page, WIDE, 2600, dark=dark)
    assert near(pixels, color(page, "paper", dark=dark)) > 0.5 * pixels.shape[0] * pixels.shape[1]
    for drawn in ("ink", "line-1", "line-2"):
        assert near(pixels, color(page, drawn, dark=dark)) > 100, drawn
    for drawn in ("line-1", "line-2"):
        assert near(pixels, color(page, drawn, dark=not dark)) < 20, f"{drawn} of the other theme"
    assert pixels.mean() < 60 if dark else pixels.mean() > 225


@pytest.mark.parametrize("name", ["one", "overlay"])
@pytest.mark.parametrize("width", [WIDE, 760, NARROW])
def test_nothing_is_wider_than_the_window(name: str, width: int, browser: Browser, pages: dict[str, Path]) -> None:
    laid_out, window = browser.widths(pages[name], width)
    assert window == width
    assert laid_out <= window


def test_a_page_that_is_too_wide_would_be_noticed(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        pages["one"].read_text().replace("</style>", "table { min-width: 2000px } .wide { overflow: visible }</style>")
    )
    laid_out, window = browser.widths(broken, WIDE)
    assert laid_out > window


def test_every_curve_is_drawn(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """Each plot alone on a page: the colour of its first line is there, and is gone without its paths."""
    text = pages["one"].read_text()
    style = text[text.index("<style>") : text.index("</style>") + 8]
    plots = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(plots) == 7
    # One page: a plot in each row of 260 pixels.
    rows = "".join(f'<div style="height: 260px; width: 600px; overflow: hidden">{plot}</div>' for plot in plots)
    alone = tmp_path / "alone.html"
    alone.write_text(f"<!doctype html><html>{style}<body style='margin: 0; padding: 0'>{rows}</body></html>")
    pixels = browser.screenshot(alone, 600, 260 * len(plots))
    line = color(pages["one"], "line-1", dark=False)
    drawn = [near(pixels[260 * row : 260 * (row + 1)], line) for row in range(len(plots))]
    assert min(drawn) > 100, drawn
    alone.write_text(re.sub(r"<path.*?/>", "", alone.read_text(), flags=re.DOTALL))
    assert near(browser.screenshot(alone, 600, 260 * len(plots)), line) == 0


@pytest.mark.parametrize("name", ["one", "overlay"])
def test_it_prints(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    assert 2 <= browser.paper_pages(pages[name]) <= 8
