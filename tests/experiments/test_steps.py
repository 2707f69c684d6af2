"""Steps are made once, again when their inputs change, and never only because something they were made from is gone."""

from pathlib import Path

import pytest

from llamapro.experiments.steps import Maker, Step
from llamapro.files.atomic import discard


class Bench:
    """Three steps, a → b → c, that note when they work."""

    def __init__(self, folder: Path, first: str = "one") -> None:
        self.folder = folder
        self.made: list[str] = []
        self.maker = Maker(folder / "stamps")
        self.a = self.step("a", first)
        self.b = self.step("b", "x", self.a)
        self.c = self.step("c", "y", self.b)

    def step(self, name: str, inputs: str, *after: Step) -> Step:
        output = self.folder / name

        def work() -> None:
            self.made.append(name)
            output.write_text(name)

        return Step(name, f"making {name}", (output,), inputs, work, after, (self.folder / f"{name}.scratch",))


def test_what_is_wanted_is_made_with_what_it_needs_and_only_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.maker.make(bench.c)
    bench.maker.make(bench.c)
    assert bench.made == ["a", "b", "c"]


def test_what_only_served_a_finished_step_may_be_gone(tmp_path: Path) -> None:
    Bench(tmp_path).maker.make(Bench(tmp_path).c)
    discard(tmp_path / "a", tmp_path / "b")
    later = Bench(tmp_path)
    later.maker.make(later.c)
    assert later.made == []


def test_what_an_unfinished_step_needs_is_made_again(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    first.maker.make(first.c)
    discard(tmp_path / "a", tmp_path / "c")
    later = Bench(tmp_path)
    later.maker.make(later.c)
    assert later.made == ["c"], "b is still there"


def test_other_inputs_make_everything_after_them_again(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    first.maker.make(first.c)
    later = Bench(tmp_path, first="two")
    later.maker.make(later.c)
    assert later.made == ["a", "b", "c"]


@pytest.mark.parametrize(("first", "kept"), [("one", True), ("two", False)])
def test_interrupted_work_continues_only_from_the_same_inputs(tmp_path: Path, first: str, *, kept: bool) -> None:
    stopped = Bench(tmp_path)

    def stop() -> None:
        (tmp_path / "a.scratch").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.maker.make(Step("a", "making a", (tmp_path / "a",), "one", stop, (), (tmp_path / "a.scratch",)))
    later = Bench(tmp_path, first=first)
    later.maker.make(later.a)
    assert (tmp_path / "a.scratch").exists() is kept


def test_what_was_finished_and_thrown_away_begins_anew(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    first.maker.make(first.a)
    (tmp_path / "a.scratch").write_text("of the finished one")
    discard(tmp_path / "a")
    later = Bench(tmp_path)
    later.maker.make(later.a)
    assert not (tmp_path / "a.scratch").exists()
