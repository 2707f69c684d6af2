"""Steps run once, continue after a stop, and start over when what they depend on changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.quickstart.steps import Step, run_steps


class Log:
    """Remembers which steps worked, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def writer(self, name: str, output: Path) -> Callable[[], None]:
        def work() -> None:
            self.names.append(name)
            output.write_text(name)

        return work


def chain(folder: Path, log: Log, first_input: str = "one") -> list[Step]:
    stamps = folder / "stamps"
    a, b, c = (folder / name for name in "abc")
    return [
        Step("a", stamps, "making a", (a,), (first_input,), log.writer("a", a)),
        Step("b", stamps, "making b", (b,), (), log.writer("b", b), after=("a",)),
        Step("c", stamps, "making c", (c,), (), log.writer("c", c)),
    ]


def test_everything_runs_in_order_and_once(tmp_path: Path) -> None:
    log = Log()
    run_steps(chain(tmp_path, log))
    run_steps(chain(tmp_path, log))
    assert log.names == ["a", "b", "c"]


def test_a_changed_input_repeats_the_step_and_what_follows_from_it(tmp_path: Path) -> None:
    log = Log()
    run_steps(chain(tmp_path, log))
    run_steps(chain(tmp_path, log, first_input="two"))
    assert log.names == ["a", "b", "c", "a", "b"]


def test_a_missing_output_repeats_its_step_only(tmp_path: Path) -> None:
    log = Log()
    run_steps(chain(tmp_path, log))
    (tmp_path / "a").unlink()
    run_steps(chain(tmp_path, log))
    assert log.names == ["a", "b", "c", "a"]


def test_an_interrupted_step_finds_its_output_again(tmp_path: Path) -> None:
    output = tmp_path / "run"
    seen: list[Path] = []

    def stopped() -> None:
        output.mkdir()
        (output / "checkpoint").write_text("step 20")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_steps([Step("train", tmp_path / "stamps", "training", (output,), ("60 steps",), stopped)])
    again = Step(
        "train", tmp_path / "stamps", "training", (output,), ("60 steps",), lambda: seen.extend(output.iterdir())
    )
    run_steps([again])
    assert [path.name for path in seen] == ["checkpoint"]


def test_an_output_begun_with_other_inputs_is_thrown_away(tmp_path: Path) -> None:
    output = tmp_path / "run"
    seen: list[bool] = []
    output.mkdir()
    (output / "checkpoint").write_text("of another recipe")
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps" / "train.begun").write_text("something else")
    step = Step(
        "train", tmp_path / "stamps", "training", (output,), ("60 steps",), lambda: seen.append(output.exists())
    )
    run_steps([step])
    assert seen == [False]


def test_a_step_that_failed_is_not_done(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def fail() -> None:
        output.write_text("half")
        raise OSError("disk full")

    log = Log()
    with pytest.raises(OSError, match="disk full"):
        run_steps([Step("a", tmp_path / "stamps", "a", (output,), (), fail)])
    run_steps([Step("a", tmp_path / "stamps", "a", (output,), (), log.writer("a", output))])
    assert log.names == ["a"]
