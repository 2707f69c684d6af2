"""The law recipes: the paper's numbers, commands that are real ones, and texts that come out of the package whole."""

import re
import subprocess
from pathlib import Path

import pytest

from llamapro.config.load import load_config
from tests.support.source import ROOT
from tests.test_readme import parse

RECIPES = ROOT / "launch" / "recipes"
NAMES = ("law-freelaw", "law-licences")


def commands(name: str) -> list[str]:
    """The commands in a recipe's first comment."""
    head = (RECIPES / f"{name}.yaml").read_text().partition("\nrun:")[0]
    return re.findall(r"^#   (\S.*)$", head, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_header_parse_and_lead_to_each_other(name: str) -> None:
    lines = commands(name)
    ours = [line for line in lines if line.startswith(("llamapro ", "deepspeed "))]
    assert len(ours) >= 5
    for line in ours:
        parse(line)
    config = load_config(RECIPES / f"{name}.yaml")
    places = [config.model.path, config.run.folder, *(source.path for source in config.data.sources.values())]
    made = [place for place in map(str, places) if not place.startswith("work/quickstart/")]
    assert [place for place in made if not any(place in line for line in ours)] == []


def test_freelaw_is_the_papers_run() -> None:
    config = load_config(RECIPES / "law-freelaw.yaml")
    schedule, optimizer = config.schedule, config.optimizer
    assert (config.batch.global_sequences, config.data.sequence_length) == (1024, 2048)
    assert (schedule.learning_rate, schedule.decay, schedule.warmup_fraction) == (2e-4, "cosine", 0.06)
    assert (optimizer.betas, optimizer.gradient_clip_norm) == ((0.9, 0.95), 1.0)
    text = "\n".join(commands("law-freelaw"))
    assert "--new-blocks 8 " in text
    for task in ("unfair_tos:4", "arc_challenge:25", "hellaswag:10", "mmlu:5", "truthfulqa_mc2:0", "winogrande:5"):
        assert task in text


def test_texts_come_out_of_the_package_without_its_notes(tmp_path: Path) -> None:
    licenses = tmp_path / "work/law/wheel/licensedcode/data/licenses"
    licenses.mkdir(parents=True)
    (licenses / "one-1.0.LICENSE").write_text("---\nkey: one-1.0\nname: One\n---\n\nOne License\n---\nYou may.\n")
    (licenses / "empty.LICENSE").write_text("---\nkey: empty\n---\n")
    loop = [line for line in commands("law-licences") if line.startswith(("mkdir", "for "))]
    subprocess.run(["bash", "-euc", "\n".join(loop)], cwd=tmp_path, check=True)
    texts = {path.name: path.read_text() for path in (tmp_path / "work/law/texts").iterdir()}
    assert texts == {"one-1.0.txt": "\nOne License\n---\nYou may.\n", "empty.txt": ""}
