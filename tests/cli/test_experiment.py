"""`llamapro experiment`: what it takes, and how it ends when its configuration can't be used."""

import argparse
from pathlib import Path

import pytest

from llamapro.cli import experiment
from llamapro.cli.main import main


def test_kinds_and_configuration_are_required() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    experiment.add_arguments(parser)
    parsed = parser.parse_args(["trace", "--config", "launch/recipes/trace-smollm2.yaml"])
    assert parsed.config == Path("launch/recipes/trace-smollm2.yaml")
    for words in (["trace"], ["sweep", "--config", "a.yaml"]):
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            parser.parse_args(words)


@pytest.mark.parametrize("kind", experiment.KINDS)
def test_a_wrong_configuration_ends_with_2_and_says_where(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("folder: out\nbase: nowhere\nseeds: [one]\n")
    assert main(["experiment", kind, "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert "seeds" in said and "(line 3)" in said
    assert "is required" in said


def test_a_missing_file_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "ablation", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
