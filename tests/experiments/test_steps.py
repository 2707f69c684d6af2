"""Steps are made once, again when their inputs change, and never only because something they were made from is gone."""

from dataclasses import replace
from pathlib import Path

import pytest

from llamapro.experiments.steps import Step, make, make_all
from llamapro.files.atomic import discard


class Bench:
    """Three steps, a → b → c, that note when they work."""

    def __init__(self, folder: Path, first: str = "one") -> None:
        self.folder = folder
        self.made: list[str] = []
        self.a = self.step("a", first)
        self.b = self.step("b", "x", self.a)
        self.c = self.step("c", "y", self.b)

    def step(self, name: str, inputs: str, *after: Step) -> Step:
        output = self.folder / name

        def work() -> None:
            self.made.append(name)
            output.write_text(name)

        scratch = (self.folder / f"{name}.scratch",)
        return Step(name, self.folder / "stamps", f"making {name}", (output,), inputs, work, after, scratch)


def test_what_is_wanted_is_made_with_what_it_needs_and_only_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    make(bench.c)
    make(bench.c)
    assert bench.made == ["a", "b", "c"]


def test_what_only_served_a_finished_step_may_be_gone(tmp_path: Path) -> None:
    make(Bench(tmp_path).c)
    discard(tmp_path / "a", tmp_path / "b")
    later = Bench(tmp_path)
    make(later.c)
    assert later.made == []


def test_what_an_unfinished_step_needs_is_made_again(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    make(first.c)
    discard(tmp_path / "a", tmp_path / "c")
    later = Bench(tmp_path)
    make(later.c)
    assert later.made == ["c"], "b is still there"


def test_other_inputs_make_everything_after_them_again(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    make(first.c)
    later = Bench(tmp_path, first="two")
    make(later.c)
    assert later.made == ["a", "b", "c"]


@pytest.mark.parametrize(("first", "kept"), [("one", True), ("two", False)])
def test_interrupted_work_continues_only_from_the_same_inputs(tmp_path: Path, first: str, *, kept: bool) -> None:

    outputs: list[bool] = []

    def stop() -> None:
        (tmp_path / "a").write_text("half")
        (tmp_path / "a.scratch").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(replace(Bench(tmp_path).a, work=stop))
    later = Bench(tmp_path, first=first)
    make(replace(later.a, work=lambda: outputs.append((tmp_path / "a").exists())))
    assert outputs == [kept]
    assert (tmp_path / "a.scratch").exists() is kept


def test_what_was_finished_and_thrown_away_begins_anew(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    make(first.a)
    (tmp_path / "a.scratch").write_text("of the finished one")
    discard(tmp_path / "a")
    later = Bench(tmp_path)
    make(later.a)
    assert not (tmp_path / "a.scratch").exists()


def test_a_step_that_failed_is_not_done(tmp_path: Path) -> None:
    first = Bench(tmp_path)

    def fail() -> None:
        first.a.work()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make(replace(first.a, work=fail))
    later = Bench(tmp_path)
    make(later.a)
    assert later.made == ["a"]


def test_all_are_made_in_order_and_counted_and_what_is_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Bench(tmp_path)
    make_all([first.a, first.b, first.c])
    assert first.made == ["a", "b", "c"]
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["[1/3] making a", "[1/3] done in 0 s"] and said[-2] == "[3/3] making c"
    later = Bench(tmp_path)
    make_all([later.a, later.b, later.c])
    assert later.made == []
    assert capsys.readouterr().err.splitlines() == [
        f"[{n}/3] making {name}: done before" for n, name in [(1, "a"), (2, "b"), (3, "c")]
    ]


def test_of_all_a_missing_one_is_made_again_alone(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    make_all([first.a, first.b, first.c])
    discard(tmp_path / "a")
    later = Bench(tmp_path)
    make_all([later.a, later.b, later.c])
    assert later.made == ["a"]


def test_of_all_those_that_need_nothing_of_a_changed_one_stay(tmp_path: Path) -> None:
    first, later = Bench(tmp_path), Bench(tmp_path, first="two")
    make_all([first.a, first.b, replace(first.c, after=())])
    make_all([later.a, later.b, replace(later.c, after=())])
    assert later.made == ["a", "b"]
