"""`llamapro evaluate --tasks` on one process and on two, kept, compared and refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.files.digests import sha256_file
from tests.support.benchmark_items import write_archive
from tests.support.models import save_tiny_llama
from tests.support.texts import LAW, write_text_dataset

WITH_OWN_ARCHIVE = """
import sys
import llamapro.evaluation.benchmarks.archive as archive
archive.ARCHIVE_SHA256 = sys.argv.pop(1)
from llamapro.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    write_archive(root / "items.whl")
    save_tiny_llama(root / "base", max_positions=2048)
    save_tiny_llama(root / "model", max_positions=2048, seed=1)
    return root


@pytest.fixture
def own_archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamapro.evaluation.benchmarks.archive.ARCHIVE_SHA256", sha256_file(root / "items.whl"))


def evaluate(root: Path, output: Path, *arguments: object) -> int:
    options = ("--task-data", root / "items.whl", "--output", output)
    return main(["evaluate", *map(str, (root / "model", *arguments, *options))])


def written(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = orjson.loads((output / "benchmarks.json").read_bytes())
    return content


@pytest.mark.usefixtures("own_archive")
def test_model_is_compared_with_its_base_and_the_second_run_only_reads(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("--tasks", "arc_easy", "piqa:2", "mbpp_bits_per_byte", "--compare", root / "base")
    assert evaluate(root, tmp_path, *tasks) == 0
    assert "arc_easy" in capsys.readouterr().out
    first = written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.json", "measurements", "report.html"]
    for name, change in first["changes"].items():
        metric = change["metric"]
        model, base = first["model"][name]["metrics"][metric], first["base"][name]["metrics"][metric]
        assert change["difference"] == pytest.approx(model["value"] - base["value"])
    assert first["model"]["piqa"]["shots"] == 2
    assert first["model"]["arc_easy"]["shots"] == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr("llamapro.evaluation.benchmarks.model.load_model", never)
    assert evaluate(root, tmp_path, *tasks) == 0
    assert written(tmp_path) == first
    with pytest.raises(AssertionError, match="loaded again"):
        evaluate(root, tmp_path, *tasks, "--limit", 3)


@pytest.mark.usefixtures("own_archive")
def test_drop_of_a_benchmark_beyond_the_limit_fails_after_the_results_are_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, metric = "mbpp_bits_per_byte", "bits_per_byte,none"
    folders = [root / "model", root / "base"]
    options = ("--tasks", name, "--task-data", root / "items.whl", "--output", tmp_path)

    def compare(*more: object) -> int:
        return main(["evaluate", *map(str, (folders[0], "--compare", folders[1], *options, *more))])

    assert compare() == 0
    if written(tmp_path)["changes"][name]["difference"] < 0:
        folders.reverse()
        assert compare() == 0
    found = written(tmp_path)
    change = found["changes"][name]
    assert change["difference"] > change["half_width"] > 0, "the drop is shown"
    assert change["verdict"] == "worse"
    fraction = change["difference"] / found["base"][name]["metrics"][metric]["value"]
    assert compare("--fail-if-drop", fraction * 1.01) == 0
    (tmp_path / "benchmarks.json").unlink()
    assert compare("--fail-if-drop", fraction * 0.99) == 1
    assert f"{name} by {fraction:+.2%}" in capsys.readouterr().err
    assert written(tmp_path) == found


def test_two_processes_score_as_one(root: Path, tmp_path: Path) -> None:
    arguments = ("--tasks", "hellaswag:3", "arc_easy", "mbpp", "--run-programs", "--task-data", root / "items.whl")
    arguments += ("--text", f"law={write_text_dataset(tmp_path / 'law', root / 'model', LAW)}")
    found, texts = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        script = tmp_path / "evaluate.py"
        script.write_text(WITH_OWN_ARCHIVE)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        command += [str(script), sha256_file(root / "items.whl"), "evaluate", str(root / "model")]
        done = subprocess.run(
            [*command, *map(str, arguments), "--output", str(output)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("hellaswag") == 1, "one table"
        found.append(written(output))
        texts.append((output / "results.json").read_bytes())
    assert found[0] == found[1]
    assert texts[0] == texts[1]
    assert found[0]["model"]["mbpp"]["metrics"]["pass@1,none"]["value"] == 0.0


@pytest.mark.usefixtures("own_archive")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nonsense"], "no such task"),
        (["--tasks", "humaneval"], "--run-programs"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 0"),
        (["--tasks", "piqa", "--batch-size", "0"], "--batch-size 0"),
        (["--tasks", "piqa", "--task-data", "/nowhere.whl"], "/nowhere.whl"),
    ],
)
def test_what_can_not_be_measured_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    options = ["--task-data", str(root / "items.whl"), *arguments, "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(root / "model"), *options]) == 2
    assert message in capsys.readouterr().err


def test_without_lm_eval_the_way_out_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llamapro.cli.benchmarks.find_spec", lambda name: None)
    assert evaluate(root, tmp_path, "--tasks", "piqa") == 2
    assert "pip install 'llamapro[eval]'" in capsys.readouterr().err


@pytest.mark.usefixtures("own_archive")
def test_broken_model_is_no_score(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(root / "model", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    options = ["--task-data", str(root / "items.whl"), "--tasks", "piqa", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(broken), *options]) == 1
    assert "outputs are broken" in capsys.readouterr().err
