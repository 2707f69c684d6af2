"""The strength dial as a user turns it: `evaluate --strengths`, `export --strength` and `--max-general-increase`."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import orjson
import pytest
import torch

from llamapro.cli.main import main
from llamapro.expansion.record import read_record
from llamapro.export.export import export
from tests.support.exports import TinyRun, make_run
from tests.support.texts import ARTICLES, LAW, WIKI, write_text_dataset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    root = tmp_path_factory.mktemp("tiny")
    tiny = make_run(root, dtype=torch.float32)
    write_text_dataset(root / "law", tiny.base, LAW)
    write_text_dataset(root / "wiki", tiny.base, WIKI)
    write_text_dataset(root / "articles", tiny.base, ARTICLES)
    text = (tiny.folder / "config.yaml").read_text().replace("nowhere", str(root))
    (tiny.folder / "config.yaml").write_text(text.replace("sequence_length: 64", "sequence_length: 32"))
    return tiny


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_curve_holds_what_exports_at_those_strengths_score(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--strengths", "1,0.5", "--general", "wiki", "--compare", tiny.base, "--output", tmp_path / "out")
    assert run("evaluate", tiny.folder, *options) == 0
    curve = orjson.loads((tmp_path / "out/strengths.json").read_bytes())
    assert [point["strength"] for point in curve["points"]] == [0.0, 0.5, 1.0]
    results = orjson.loads((tmp_path / "out/results.json").read_bytes())
    for point, expected in ((curve["points"][0], "base"), (curve["points"][2], "model")):
        for name, score in point["sets"].items():
            assert score["loss"] == results[expected]["sets"][name]["loss"]
    assert curve["points"][2]["changes"]["wiki"] == results["changes"]["wiki"]
    texts = [f"--text={name}={tiny.base.parent / name}" for name in ("law", "wiki")]
    assert run("export", tiny.folder, tmp_path / "half", "--strength", 0.5) == 0
    assert run("evaluate", tmp_path / "half", *texts, "--sequence-length", 32, "--output", tmp_path / "half-out") == 0
    half = orjson.loads((tmp_path / "half-out/results.json").read_bytes())["model"]["sets"]
    assert {name: score["loss"] for name, score in half.items()} == {
        name: score["loss"] for name, score in curve["points"][1]["sets"].items()
    }
    shown = capsys.readouterr().out
    assert "wiki (general)" in shown and re.search(r"^ *0.5 .*\([+-]\d+\.\d\d ± .* %\)", shown, re.MULTILINE)
    picture = (tmp_path / "out/strengths.svg").read_text()
    ElementTree.fromstring(picture)
    assert "change of loss on wiki (general), %" in picture and ">0.5<" in picture


def test_a_second_look_reads_the_curve_that_the_first_measured(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tiny.folder, tmp_path / "model")
    texts = [f"--text={name}={tiny.base.parent / name}" for name in ("law", "wiki")]
    command = ("evaluate", tmp_path / "model", *texts, "--general", "wiki", "--output", tmp_path / "out", "--strengths")
    assert run(*command, "0.5") == 0
    first = (tmp_path / "out/strengths.json").read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was built again")

    monkeypatch.setattr("llamapro.evaluation.measure.build_model", never)
    assert run(*command, "0.5") == 0
    assert (tmp_path / "out/strengths.json").read_bytes() == first
    with pytest.raises(AssertionError, match="built again"):
        run(*command, "0.6")


def test_the_largest_strength_within_a_bound_is_found_said_and_exported(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = ("--max-general-increase", 0.001, "--probe", f"wiki={tiny.base.parent / 'articles'}")
    assert run("export", tiny.folder, tmp_path / "out", *bound) == 0
    found = re.search(r"strength (0\.\d+) \(\d+ tried\).*wiki \+?(-?\d\.\d\d)", captured := capsys.readouterr().out)
    assert found is not None, captured
    assert "on rows that had no part in the choice" in captured
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.trained.strengths == {"2": float(found[1]), "5": float(found[1])}
    assert float(found[2]) <= 0.1
    assert "at which the loss on general text is at most 0.10%" in (tmp_path / "out/README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert run("verify", tmp_path / "out", "--base", tiny.base) == 0


def test_a_bound_that_nothing_keeps_ends_in_1_and_writes_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    bound = ("--max-general-increase", 1e-9, "--probe", f"wiki={tiny.base.parent / 'articles'}")
    assert run("export", tiny.folder, tmp_path / "out", *bound) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "RUN", "--strengths", "0,1"], "--general"),
        (["evaluate", "RUN", "--general", "law"], "--strengths"),
        (["evaluate", "RUN", "--strengths", "0,2", "--general", "law"], "not between 0"),
        (["evaluate", "RUN", "--strengths", "0,1", "--general", "lwa"], "'lwa'"),
        (["evaluate", "RUN", "--strengths", "0,1", "--general", "law", "--text", "law=LAW"], "at least two texts"),
        (
            ["evaluate", "BASE", "--strengths", "0", "--general", "a", "--text", "a=LAW", "--text", "b=LAW"],
            "never expanded",
        ),
        (["export", "RUN", "--strength", "1.5"], "1.5"),
        (["export", "RUN", "--strength", "0.5", "--max-general-increase", "0.1", "--probe", "a=LAW"], "one of them"),
        (["export", "RUN", "--max-general-increase", "0.1"], "--probe"),
        (["export", "RUN", "--probe", "a=LAW"], "--max-general-increase"),
        (["export", "RUN", "--max-general-increase", "-0.1", "--probe", "a=LAW"], "above 0"),
        (["export", "RUN", "--max-general-increase", "0.1", "--probe", "a=/nowhere"], "/nowhere"),
        (
            ["export", "RUN", "--max-general-increase", "0.1", "--probe", "a=LAW", "--probe-sequences", "3"],
            "at least 4 rows",
        ),
        (["export", "RUN", "--max-general-increase", "0.1", "--probe", "a=LAW", "--probe", "a=LAW"], "two texts"),
    ],
)
def test_what_can_not_be_done_is_refused_with_the_way_out(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"RUN": str(tiny.folder), "BASE": str(tiny.base), "LAW": str(tiny.base.parent / "law")}
    for key, place in places.items():
        arguments = [argument.replace(key, place) for argument in arguments]
    out = str(tmp_path / "out")
    assert main([*arguments, *(["--output", out] if arguments[0] == "evaluate" else [out])]) == 2
    assert message in capsys.readouterr().err
