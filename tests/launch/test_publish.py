"""The result as people see it: table, picture, README region."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch.quickstart.plan import Places
from launch.quickstart.publish import BEGIN, END, draw, markdown, publish, replace_region, show
from launch.quickstart.result import Outcome, Score
from llamapro.errors import UserError
from llamapro.evaluation.results import Change, SetResult
from tests.support.source import ROOT


def scored(bits: float, loss: float) -> SetResult:
    return SetResult(
        dataset="data/x",
        dataset_fingerprint="f",
        split="heldout",
        loss=loss,
        loss_half_width=None,
        bits_per_byte=bits,
        bits_per_byte_half_width=None,
        tokens=20000,
        bytes=80000,
        rows=40,
    )


OUTCOME = Outcome(
    scores=(
        Score("the domain", scored(1.0, 3.25), scored(0.8, 2.6), Change(fraction=-0.2, half_width=0.013)),
        Score("general", scored(0.9, 3.4), scored(0.9, 3.4), Change(fraction=0.0, half_width=None)),
    ),
    losses=((1, 3.2), (2, 3.0)),
    base_blocks=30,
    blocks=36,
    base_tensors=272,
    tokens=2048,
    training_minutes=1.5,
    samples=({"model": "work/export", "prompt": "Ataxia:", "continuation": " a\n sign"},),
    machine="2 CPU processes",
)


def test_table_says_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    table = markdown(OUTCOME, "picture.svg")
    assert "| the domain | 1.000 | 0.800 | -20.0% ± 1.3% |" in table
    assert "| general | 0.900 | 0.900 | +0.0% |" in table
    assert "(picture.svg)" in table
    show(OUTCOME)
    shown = capsys.readouterr().out
    assert "All 272 tensors of the base are bit-identical" in shown
    assert "Ataxia: a sign" in shown


def test_picture_is_svg_with_the_measured_numbers() -> None:
    picture = draw(OUTCOME)
    texts = {element.text for element in ElementTree.fromstring(picture).iter() if element.text}
    assert {"1.000", "0.800", "the domain"} <= texts
    assert draw(OUTCOME) == picture
    worse = replace(
        OUTCOME,
        scores=(Score("the domain", scored(1.0, 3.25), scored(1.1, 3.5), Change(fraction=0.1, half_width=None)),),
    )
    assert "1.100" in draw(worse)


def test_only_the_marked_region_of_a_readme_changes(tmp_path: Path) -> None:
    text = f"# head\n{BEGIN}\nold\n{END}\ntail\n"
    new = replace_region(text, "new \\1 text", tmp_path)
    assert new == f"# head\n{BEGIN}\nnew \\1 text\n{END}\ntail\n"
    assert replace_region(new, "old", tmp_path) == text


@pytest.mark.parametrize("text", ["# no region", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_one_region_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one region"):
        replace_region(text, "new", tmp_path / "README.md")


def test_this_readme_has_the_region() -> None:
    replace_region((ROOT / "README.md").read_text(), "new", ROOT / "README.md")


def test_publishing_fills_the_checkout_only_when_there_is_one(tmp_path: Path) -> None:
    places = Places(tmp_path / "work", tmp_path / "work")
    places.root.mkdir()
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "README.md").write_text(f"{BEGIN}{END}")
    publish(OUTCOME, places, None)
    assert (places.outcome / "result.md").is_file()
    assert (checkout / "README.md").read_text() == f"{BEGIN}{END}"
    publish(OUTCOME, places, checkout)
    assert "-20.0%" in (checkout / "README.md").read_text()
    assert (checkout / "docs" / "quickstart.svg").read_text() == (places.outcome / "quickstart.svg").read_text()
