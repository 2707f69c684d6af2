"""The report shows what the run's files say, in one file that needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import orjson
import pytest

from llamapro.errors import Corrupted, UserError
from llamapro.evaluation.benchmarks.store import (
    BenchmarkResults,
    MetricResult,
    TaskChange,
    TaskResult,
    write_benchmarks,
)
from llamapro.evaluation.results import Change, ModelResult, Results, SetResult, write_results
from llamapro.report.collect import collect, read_run
from llamapro.report.events import events_of
from llamapro.report.facts import Sample, SampleGroup
from llamapro.report.page import write_report
from llamapro.report.picture import write_result_picture
from llamapro.report.plots import compact, running_mean, thin
from tests.support.exports import TinyRun, make_run, step_line, validation

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}


class Page(HTMLParser):
    """Collects what a browser would fetch, the text of each element, and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.referenced: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in LOADING and not (value or "").startswith("#"):
                self.fetched.append(f"{name}={value}")
            elif name in LOADING:
                self.referenced.append((value or "")[1:])
            self.referenced += re.findall(r"url\(#([^)]+)\)", value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag in {"td", "th", "b"}:
            self.cells.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closed out of order"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"td", "th", "b"}:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    tiny = make_run(tmp_path_factory.mktemp("tiny"))
    (tiny.folder / "environment.json").write_text('{"gpus": ["a", "b"], "versions": {"torch": "2.13.0"}}')
    return tiny


def test_page_shows_the_numbers_of_the_run(tiny: TinyRun) -> None:
    page = Page(write_report(tiny.folder))
    for shown in ("4 → 6", "12 of 12", "6,144", "24 s", "1.2500", "1.0000", "−20.00%", "−0.50%", "2.13.0", "a, b"):
        assert shown in page.cells, shown
    assert page.tags.count("svg") == 7


def test_page_loads_nothing_and_runs_nothing(tiny: TinyRun) -> None:
    written = SampleGroup("Written", (Sample("m", "", (("<script>alert(1)</script> once", True),)),))
    path = write_report(tiny.folder, samples=[written])
    page, text = Page(path), path.read_text()
    assert page.fetched == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert not re.search(r"\son\w+=", text)
    assert "&lt;script&gt;alert(1)" in text


def test_ids_of_the_plots_do_not_clash_and_every_reference_resolves(tiny: TinyRun) -> None:
    page = Page(write_report(tiny.folder))
    assert len(page.ids) == len(set(page.ids)) > 0
    assert page.referenced
    assert set(page.referenced) <= set(page.ids)


def test_every_colour_of_a_plot_can_be_changed_by_dark_mode(tiny: TinyRun) -> None:
    text = write_report(tiny.folder).read_text()
    plots = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    fixed = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})(?!; (?:fill|stroke): var)", plots)
    assert fixed == []
    defined = set(re.findall(r"(--[a-z0-9-]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) <= defined
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_divergence_from_the_base_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    lines = [{**step_line(step), "replay_kl": 0.01 / step} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (plot,) = [plot for plot in collect(read_run(tmp_path)).plots if plot.key == "replay_kl"]
    assert plot.series == {"replay_kl": [(1.0, 0.01), (2.0, 0.005)]}


def test_same_run_gives_the_same_page(tiny: TinyRun) -> None:
    assert write_report(tiny.folder).read_bytes() == write_report(tiny.folder).read_bytes()


def test_young_run_without_measurements_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: work/model}\n")
    page = Page(write_report(tmp_path))
    assert "svg" not in page.tags
    assert "0" in page.cells
    (tmp_path / "metrics.jsonl").write_bytes(orjson.dumps(step_line(1)) + b'\n{"step": 2, "lo')
    assert Page(write_report(tmp_path)).tags.count("svg") == 5


def test_changed_base_tensor_is_shown_as_broken(tmp_path: Path) -> None:
    lines = [{"event": "proof", "equal": 38, "total": 38}, {"event": "proof", "equal": 37, "total": 38}]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    assert '<p class="proof broken">Compared bit for bit: 37 of 38 base tensors' in write_report(tmp_path).read_text()


def test_what_went_wrong_stands_at_the_top_and_in_the_list(tmp_path: Path) -> None:
    happened = [
        {"event": "skip", "step": 4, "reason": "loss is nan"},
        {"event": "save failed", "step": 6, "reason": "the disk is <full>", "in_a_row": 1},
        {"event": "rollback", "step": 9, "checkpoint": "step-00000006", "skipped_steps": [7, 9]},
        {"event": "rollback", "step": 12, "checkpoint": "step-00000010", "skipped_steps": [11, 12]},
        {"event": "proof", "equal": 38, "total": 38, "text": "38 of 38 equal; max |Δlogit| at start 0"},
    ]
    lines = [step_line(12), *happened]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    path = write_report(tmp_path)
    cards = path.read_text().partition('<p class="proof')[0]
    for shown in ("<b>2</b>5 steps undone, the last to step-00000010", "1 skipped"):
        assert shown in cards, shown
    assert "<b>1</b>the last at step 6: the disk is &lt;full&gt;" in cards
    assert "Compared bit for bit: 38 of 38 equal; max |Δlogit| at start 0." in path.read_text()
    assert [cell for cell in Page(path).cells if cell in ("skip", "save failed", "rollback", "proof")] == [
        line["event"] for line in happened
    ]


def test_a_run_without_mishaps_has_no_cards_of_them(tiny: TinyRun) -> None:
    labels = re.findall(r"<dt>([^<]*)</dt>", write_report(tiny.folder).read_text())
    assert "optimizer steps" in labels and not {"rollbacks", "failed saves"} & set(labels)


def test_evaluation_of_the_run_is_shown_against_its_base(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {seed: 1}\n")
    (tmp_path / "evaluation").mkdir()
    model = ModelResult(name="m", digest="m", sets={"wiki": scored(1.5)})
    base = ModelResult(name="b", digest="b", sets={"wiki": scored(1.25)})
    change = {"wiki": Change(fraction=0.2, half_width=0.015)}
    write_results(tmp_path / "evaluation", Results(settings={}, versions={}, model=model, base=base, changes=change))
    path = write_report(tmp_path)
    for shown in ("1.2500 ± 0.0100", "1.5000 ± 0.0100", "+20.00% ± 1.50%"):
        assert shown in Page(path).cells, shown
    assert '<td class="worse">+20.00%' in path.read_text()


def test_benchmarks_of_the_run_are_shown_against_its_base(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {seed: 1}\n")
    (tmp_path / "elsewhere").mkdir()

    def task(value: float) -> TaskResult:
        metrics = {"acc,none": MetricResult(value=value, half_width=0.02, higher_is_better=True)}
        return TaskResult(tasks=1, items=2000, shots=0, metric="acc,none", metrics=metrics)

    change = TaskChange(metric="acc,none", difference=-0.0625, half_width=0.0125, verdict="worse")
    results = BenchmarkResults(
        settings={}, versions={}, model_name="m", model={"arc_easy": task(0.5), "piqa": task(0.75)},
        base_name="b", base={"arc_easy": task(0.5625)}, changes={"arc_easy": change}, absent=["mmlu"],
    )  # fmt: skip
    write_benchmarks(tmp_path / "elsewhere", results)
    assert "Retention" not in write_report(tmp_path).read_text()
    path = write_report(tmp_path, evaluation=tmp_path / "elsewhere")
    for shown in ("arc_easy", "acc", "2,000", "0.5625 ± 0.0200", "0.7500 ± 0.0200", "−0.0625 ± 0.0125"):
        assert shown in Page(path).cells, shown
    assert '<td class="worse">−0.0625' in path.read_text()
    assert "Not measured: mmlu." in path.read_text()
    (tmp_path / "elsewhere" / "benchmarks.json").write_text("{}")
    with pytest.raises(Corrupted, match="evaluate again"):
        write_report(tmp_path, evaluation=tmp_path / "elsewhere")


def test_no_spike_is_lost_where_a_series_is_thinned() -> None:
    points = [(float(step), 9.0 if step == 17_003 else -5.0 if step == 21_111 else 1.0) for step in range(30_000)]
    thinned = thin(points, 1000)
    assert len(thinned) <= 1010
    assert {(17_003.0, 9.0), (21_111.0, -5.0), points[0], points[-1]} <= set(thinned)
    assert [step for step, _ in thinned] == sorted(step for step, _ in thinned)


def test_running_mean_is_the_mean_around_each_place() -> None:
    points = [(float(step), float(step % 7)) for step in range(200)]
    smooth = running_mean(points)
    for place in (0, 1, 57, 199):
        near = [value for _, value in points[max(0, place - 2) : place + 3]]
        assert smooth[place] == (float(place), pytest.approx(sum(near) / len(near)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.25, "0.25"), (5e-4, "5e−4"), (-12.5, "−12.5"), (12000, "12,000"), (2.5e6, "2.5M"), (0.05, "0.05")],
)
def test_ticks_are_short(value: float, shown: str) -> None:
    assert compact(value) == shown


def test_save_and_its_proof_are_one_event_and_a_lone_proof_is_its_own() -> None:
    proof = {"event": "proof", "equal": 2, "total": 2, "text": "2 of 2 equal", "time": "2026-01-02T03:04:05+0000"}
    save = {"event": "save", "step": 1200, "seconds": 4.21, "stalled_seconds": 0.25, "time": "2026-01-02T03:04:06+0100"}
    resume = {"event": "resume", "step": 9, "checkpoint": "step-00000009", "changes": ["a is now b"]}
    drift = {"event": "retention", "step": 9, "set": "wiki", "increase": 0.0312, "bound": 0.02, "action": "stop"}
    events = events_of([proof, resume, proof, save, save, {**proof, "equal": 1}, {"event": "new", "what": 1}, drift])
    told = "in 4.2 s; training stood still for 0.25 s of it"
    assert [(event.name, event.details) for event in events] == [
        ("proof", "2 of 2 equal"),
        ("resume", "from step-00000009; a is now b"),
        ("save", f"{told}; 2 of 2 equal"),
        ("save", told),
        ("proof", "2 of 2 equal"),
        ("new", "what 1"),
        ("retention", "wiki is 3.12% above the base, the bound is 2.00%: stop"),
    ]
    assert [event.time for event in events[:3]] == ["2026-01-02 03:04:05 UTC", "", "2026-01-02 03:04:06 +0100"]
    assert [event.grave for event in events] == [False] * 4 + [True, False, True]
    assert events[2].step == "1,200"


def scored(bits: float) -> SetResult:
    return SetResult(
        dataset="data/wiki",
        dataset_fingerprint="f",
        split="heldout",
        loss=2 * bits,
        loss_half_width=0.02,
        bits_per_byte=bits,
        bits_per_byte_half_width=0.01,
        tokens=100,
        bytes=400.0,
        rows=4,
    )


def test_before_needs_step_zero(tmp_path: Path) -> None:
    lines = [validation(4, 1.2, 1.5), validation(8, 1.1, 1.5)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    assert "Before and after" not in write_report(tmp_path).read_text()
    with pytest.raises(UserError, match="nothing to draw"):
        write_result_picture(tmp_path, tmp_path / "result.svg")


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_long_series_are_thinned_but_keep_their_ends(tmp_path: Path) -> None:
    lines = [step_line(step) for step in range(1, 30_001)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    path = write_report(tmp_path)
    assert path.stat().st_size < 1_500_000
    assert "30,000" in Page(path).cells


def test_picture_is_one_svg_with_both_values_of_every_set(tiny: TinyRun, tmp_path: Path) -> None:
    write_result_picture(tiny.folder, tmp_path / "docs/result.svg")
    root = ElementTree.parse(tmp_path / "docs/result.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for shown in ("law", "wiki", "1.250", "1.000 (-20.0%)", "1.500", "1.492 (-0.5%)"):
        assert any(text.strip() == shown for text in texts), (shown, texts)
