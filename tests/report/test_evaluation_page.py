"""The page of an evaluation shows what its files say, of the one model it is about, and needs nothing else."""

import re
from pathlib import Path

import pytest

from llamapro.errors import Corrupted
from llamapro.evaluation.benchmarks.store import (
    BenchmarkResults,
    MetricResult,
    TaskChange,
    TaskResult,
    write_benchmarks,
)
from llamapro.evaluation.results import (
    Change,
    Contribution,
    ModelResult,
    Results,
    SetResult,
    TokenShift,
    write_results,
)
from llamapro.evaluation.stored import write_stored
from llamapro.evaluation.strength import STRENGTHS_NAME, StrengthCurve, StrengthPoint
from llamapro.report.evaluation import write_evaluation_page
from tests.report.test_looks import NARROW, WIDE, color, near
from tests.report.test_report import Page
from tests.support.browser import Browser

MODEL, BASE = "runs/<law>", "base"


def scored(bits: float) -> SetResult:
    return SetResult(
        dataset="data",
        dataset_fingerprint="f",
        split="heldout",
        loss=bits,
        loss_half_width=0.25,
        bits_per_byte=bits,
        bits_per_byte_half_width=0.125,
        tokens=4096,
        bytes=9000.0,
        rows=4,
    )


def write_texts(folder: Path, model: str = MODEL) -> None:
    results = Results(
        settings={"device": "cpu"},
        versions={"torch": "2.13.0"},
        model=ModelResult(name=model, digest="abc123", sets={"law": scored(0.75), "wiki": scored(1.5)}),
        base=ModelResult(name=BASE, digest="def456", sets={"law": scored(1.0), "wiki": scored(1.5)}),
        changes={"law": Change(fraction=-0.25, half_width=0.01), "wiki": Change(fraction=0.004, half_width=0.005)},
        verdicts={"law": "better", "wiki": "no difference shown"},
        detail_sequences=16,
        contributions={"3": {"law": Contribution(increase=0.0625, half_width=0.001)}},
        shifts={"law": TokenShift(positions=1000, unshifted=900, marginal=75, shifted=25)},
    )
    write_results(folder, results)


def tasks(value: float) -> dict[str, TaskResult]:
    metrics = {"acc,none": MetricResult(value=value, half_width=0.05, higher_is_better=True)}
    return {"piqa": TaskResult(tasks=1, items=1838, shots=0, metric="acc,none", metrics=metrics)}


def write_all(folder: Path) -> None:
    write_texts(folder)
    change = TaskChange(metric="acc,none", difference=-0.125, half_width=0.0625, verdict="worse")
    results = BenchmarkResults(
        settings={"limit": None},
        versions={"lm-eval": "0.4.13"},
        model_name=MODEL,
        model=tasks(0.625),
        base_name=BASE,
        base=tasks(0.75),
        changes={"piqa": change},
        absent=["mmlu"],
    )
    write_benchmarks(folder, results)
    points = tuple(
        StrengthPoint(
            strength=strength,
            sets={"law": scored(1.0), "wiki": scored(1.5)},
            changes={
                "law": Change(fraction=-0.5 * strength, half_width=0.01),
                "wiki": Change(fraction=0.03 * strength, half_width=None),
            },
        )
        for strength in (0.0, 0.5, 1.0)
    )
    curve = StrengthCurve(
        settings={}, versions={}, model=MODEL, digest="abc123", blocks=(3, 7), general="wiki", points=points
    )
    write_stored(folder / STRENGTHS_NAME, curve)


def test_page_shows_benchmarks_texts_verdicts_details_and_the_strength_curve(tmp_path: Path) -> None:
    write_all(tmp_path)
    page = Page(write_evaluation_page(tmp_path, MODEL))
    shown = ("piqa", "1,838", "0.7500 ± 0.0500", "0.6250 ± 0.0500", "−0.1250 ± 0.0625", "worse")
    shown += ("law", "1.0000 ± 0.1250", "0.7500 ± 0.1250", "−25.00 ± 1.00 %", "better", "no difference shown")
    shown += ("90.00%", "7.50%", "2.50%", "block 3", "+0.0625 ± 0.0010", "0.5", "+1.50 %", "wiki (general)", "abc123")
    for cell in shown:
        assert cell in page.cells, cell
    assert page.tags.count("svg") == 2
    text = (tmp_path / "report.html").read_text()
    assert "runs/&lt;law&gt;" in text and "<law>" not in text
    assert "Not measured, for want of items: mmlu." in text


def test_page_loads_nothing_and_takes_the_readers_colours(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = write_evaluation_page(tmp_path, MODEL)
    page, text = Page(path), path.read_text()
    assert page.fetched == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert set(page.referenced) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert path.read_bytes() == write_evaluation_page(tmp_path, MODEL).read_bytes()


def test_what_was_measured_of_another_model_is_not_on_the_page(tmp_path: Path) -> None:
    write_all(tmp_path)
    write_texts(tmp_path, "another model")
    page = Page(write_evaluation_page(tmp_path, MODEL))
    assert "piqa" in page.cells
    assert "90.00%" not in page.cells


def test_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / STRENGTHS_NAME).write_text("{torn")
    with pytest.raises(Corrupted, match=STRENGTHS_NAME):
        write_evaluation_page(tmp_path, MODEL)


def test_browser_draws_it_in_both_themes_within_the_window_and_on_paper(tmp_path: Path) -> None:
    browser = Browser.find(tmp_path)
    write_all(tmp_path)
    page = write_evaluation_page(tmp_path, MODEL)
    for dark in (False, True):
        pixels = browser.screenshot(page, WIDE, 1800, dark=dark)
        assert near(pixels, color(page, "paper", dark=dark)) > 0.5 * pixels.shape[0] * pixels.shape[1]
        for drawn in ("ink", "better", "worse", "line-1", "line-2"):
            assert near(pixels, color(page, drawn, dark=dark)) > 20, (drawn, dark)
    shown, window = browser.widths(page, NARROW)
    assert shown <= window
    assert browser.paper_pages(page) >= 1
