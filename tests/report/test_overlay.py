"""Several runs on one page: each curve and number beside the other's, and only the settings that differ."""

import shutil
from pathlib import Path

import orjson
import pytest

from llamapro.errors import UserError
from llamapro.report.collect import read_run
from llamapro.report.overlay import overlay, read_runs, run_names
from llamapro.report.page import write_overlay
from tests.report.test_report import Page
from tests.support.exports import make_run, step_line, validation


def comparable_runs(root: Path) -> list[Path]:
    """Two runs that differ in learning rate and seed, the second one measured further."""
    first = make_run(root).folder.rename(root / "slow")
    second = root / "fast"
    shutil.copytree(first, second)
    text = (second / "config.yaml").read_text()
    text = text.replace("learning_rate: 0.0005", "learning_rate: 0.002").replace("seed: 7", "seed: 8")
    (second / "config.yaml").write_text(text.replace(str(root / "run"), str(second)))
    lines = [validation(0, 1.25, 1.5), *map(step_line, range(1, 21)), validation(20, 0.75, 1.53)]
    events = [{"event": "proof", "equal": 38, "total": 38}, {"event": "skip", "step": 4, "reason": "loss is nan"}]
    (second / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in [*lines, *events]))
    for folder, gpu in ((first, "A100"), (second, "H100")):
        (folder / "environment.json").write_text(f'{{"device": "{gpu}", "python": "3.11"}}')
    return [first, second]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return comparable_runs(tmp_path_factory.mktemp("runs"))


def rows_of(runs: list[Path], title: str) -> dict[str, tuple[str, ...]]:
    """A table's rows by their first cells."""
    (table,) = [table for table in overlay(read_runs(runs)).tables if table.title == title]
    assert table.columns == ("", "slow", "fast")
    return {row[0].text: tuple(cell.text for cell in row[1:]) for row in table.rows}


def test_only_settings_that_differ_are_shown_and_never_the_folder(runs: list[Path]) -> None:
    differ = rows_of(runs, "Settings that differ")
    assert differ == {"run.seed": ("7", "8"), "schedule.learning_rate": ("0.0005", "0.002")}
    assert rows_of(runs, "Environments that differ") == {"device": ("A100", "H100")}


def test_a_setting_that_one_run_lacks_is_a_difference(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "fast")
    text = (runs[0] / "config.yaml").read_text()
    (tmp_path / "fast" / "config.yaml").write_text(text + "model2: {deep: {er: null}}\n")
    assert rows_of([runs[0], tmp_path / "fast"], "Settings that differ") == {"model2.deep.er": ("–", "null")}


def test_equal_settings_make_no_table(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    titles = {table.title for table in overlay(read_runs([runs[0], tmp_path / "again"])).tables}
    assert "Runs" in titles and not {title for title in titles if "differ" in title}


def test_results_stand_side_by_side(runs: list[Path]) -> None:
    assert rows_of(runs, "Held-out text") == {
        "law": ("1.0000 (−20.00%)", "0.7500 (−40.00%)"),
        "wiki": ("1.4925 (−0.50%)", "1.5300 (+2.00%)"),
    }
    summary = rows_of(runs, "Runs")
    assert summary["optimizer steps"] == ("12", "20")
    assert summary["skipped steps"] == ("–", "1")
    assert summary["frozen weights"] == ("38 of 38 base tensors equal the record",) * 2
    assert "rollbacks" not in summary


def test_every_curve_has_a_line_of_each_run(runs: list[Path]) -> None:
    plots = {plot.title: plot for plot in overlay(read_runs(runs)).plots}
    single = ["Training loss", "Learning rate", "Gradient norm before clipping", "Throughput", "Memory"]
    parts = [f"{what}: {name}" for what in ("Training loss", "Held-out text") for name in ("law", "wiki")]
    assert set(plots) == {*single, *parts}
    for plot in plots.values():
        assert list(plot.series) == ["slow", "fast"] and plot.across == "step"
    assert plots["Training loss"].series["fast"][-1] == (20.0, 2.0)
    assert plots["Held-out text: law"].series["slow"] == [(0, 1.25), (12, 1.0)]


def test_runs_with_steps_of_another_size_are_drawn_over_tokens(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "fast")
    with (tmp_path / "fast" / "config.yaml").open("a") as file:
        file.write("batch: {global_sequences: 8}\n")
    plots = {plot.title: plot for plot in overlay(read_runs([runs[0], tmp_path / "fast"])).plots}
    assert {plot.across for plot in plots.values()} == {"tokens"}
    assert plots["Training loss"].series["slow"][-1][0] == 512 * 12
    assert plots["Held-out text: law"].series["fast"] == [(0.0, 1.25), (512.0 * 20, 0.75)]


def test_page_is_whole_and_lies_in_the_first_run(runs: list[Path]) -> None:
    path = write_overlay(runs)
    page = Page(path)
    assert path == runs[0] / "comparison.html"
    assert page.fetched == [] and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids)) > 0 and set(page.referenced) <= set(page.ids)
    assert page.tags.count("svg") == 9
    assert page.cells.count("slow") >= 4
    assert write_overlay(runs).read_bytes() == path.read_bytes()


def test_runs_are_told_apart_by_the_shortest_part_of_their_paths(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names([tmp_path / "x/one/run", tmp_path / "x/two/run"]) == ["one/run", "two/run"]
    with pytest.raises(UserError, match="named twice"):
        run_names([tmp_path / "a", tmp_path / "b", tmp_path / "b/../a"])


def test_young_runs_have_a_page_too(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("run: {seed: 1}\n")
    page = Page(write_overlay([tmp_path / "one", tmp_path / "two"]))
    assert "svg" not in page.tags
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path)
