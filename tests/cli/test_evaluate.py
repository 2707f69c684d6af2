"""`llamapro evaluate` against a plain transformers loop over single documents, and its promises to scripts."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamapro.cli.main import main
from llamapro.export.export import export
from tests.cli.test_export import WITHOUT_DEEPSPEED
from tests.support.exports import TinyRun, make_run
from tests.support.texts import LAW, WIKI, token_ids, write_text_dataset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    root = tmp_path_factory.mktemp("tiny")
    tiny = make_run(root, dtype=torch.float32)
    write_text_dataset(root / "law", tiny.base, LAW, train=WIKI)
    write_text_dataset(root / "wiki", tiny.base, WIKI)
    text = (tiny.folder / "config.yaml").read_text().replace("nowhere", str(root))
    (tiny.folder / "config.yaml").write_text(text)
    return tiny


@pytest.fixture(scope="module")
def exported(tiny: TinyRun) -> Path:
    out = tiny.base.parent / "exported"
    export(tiny.folder, out)
    return out


def plain_score(folder: Path, texts: tuple[str, ...]) -> tuple[float, float, int]:
    """Loss per token, bits per byte and targets, one document at a time, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for text in texts:
        ids = torch.tensor([token_ids(text)])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        targets += ids.shape[1] - 1
    return total / targets, total / math.log(2) / sum(len(text.encode()) for text in texts), targets


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_scores_are_those_of_a_plain_loop_over_documents(tiny: TinyRun, exported: Path, tmp_path: Path) -> None:
    root = tiny.base.parent
    texts = ("--text", f"law={root / 'law'}", "--text", f"wiki={root / 'wiki'}", "--text", f"old={root / 'law'}:train")
    assert evaluate(exported, *texts, "--compare", tiny.base, "--sequence-length", 128, "--output", tmp_path) == 0
    results = orjson.loads((tmp_path / "results.json").read_bytes())
    for model, folder in (("model", exported), ("base", tiny.base)):
        for name, documents in (("law", LAW), ("wiki", WIKI), ("old", WIKI)):
            loss, bits, targets = plain_score(folder, documents)
            found = results[model]["sets"][name]
            assert found["loss"] == pytest.approx(loss, rel=1e-5)
            assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
            assert found["tokens"] == targets
            assert found["bytes"] == sum(len(text.encode()) for text in documents)
    model, base = results["model"]["sets"]["law"], results["base"]["sets"]["law"]
    assert results["changes"]["law"]["fraction"] == pytest.approx(model["loss"] / base["loss"] - 1)


def test_expanded_model_scores_exactly_as_its_base(tiny: TinyRun, tmp_path: Path) -> None:
    law = f"law={tiny.base.parent / 'law'}"
    assert evaluate(tiny.model, "--text", law, "--compare", tiny.base, "--output", tmp_path) == 0
    results = orjson.loads((tmp_path / "results.json").read_bytes())
    assert results["model"]["digest"] != results["base"]["digest"]
    assert results["changes"]["law"] == {"fraction": 0.0, "half_width": 0.0}
    assert results["verdicts"] == {"law": "no difference shown"}


def test_run_is_evaluated_as_its_export_on_its_own_sets_and_nothing_is_left(
    tiny: TinyRun, exported: Path, tmp_path: Path
) -> None:
    for source, output in ((tiny.folder, "run"), (tiny.checkpoint, "checkpoint"), (exported, "export")):
        sets = [f"--text={name}={tiny.base.parent / name}" for name in ("law", "wiki")] if source == exported else []
        assert evaluate(source, *sets, "--sequence-length", 64, "--output", tmp_path / output) == 0
    results = {
        name: orjson.loads((tmp_path / name / "results.json").read_bytes())["model"] for name in ("run", "export")
    }
    assert results["run"]["digest"] == results["export"]["digest"]
    assert results["run"]["sets"].keys() == {"law", "wiki"}
    for name, score in results["run"]["sets"].items():
        assert score["loss"] == results["export"]["sets"][name]["loss"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["measurements", "report.html", "results.json"]
    assert (tmp_path / "checkpoint/results.json").is_file()


def test_second_evaluation_reads_what_the_first_measured(
    exported: Path, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = f"law={tiny.base.parent / 'law'}"
    assert evaluate(exported, "--text", law, "--output", tmp_path) == 0
    first = (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").unlink()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was built again")

    monkeypatch.setattr("llamapro.evaluation.measure.build_model", never)
    assert evaluate(exported, "--text", law, "--output", tmp_path) == 0
    assert (tmp_path / "results.json").read_bytes() == first
    with pytest.raises(AssertionError, match="built again"):
        evaluate(exported, "--text", law, "--precision", "bf16", "--output", tmp_path)


def test_drop_beyond_the_limit_fails_after_the_results_are_written(
    tiny: TinyRun, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = f"law={tiny.base.parent / 'law'}"
    options = ("--text", law, "--compare", exported, "--sequence-length", 32, "--output", tmp_path)
    assert evaluate(tiny.base, *options) == 0
    fraction = orjson.loads((tmp_path / "results.json").read_bytes())["changes"]["law"]["fraction"]
    assert fraction > 0, "the random base is the worse of the two"
    assert orjson.loads((tmp_path / "results.json").read_bytes())["verdicts"] == {"law": "worse"}
    assert evaluate(tiny.base, *options, "--fail-if-drop", fraction * 1.01) == 0
    (tmp_path / "results.json").unlink()
    assert evaluate(tiny.base, *options, "--fail-if-drop", fraction * 0.99) == 1
    assert f"law by {fraction:+.2%}" in capsys.readouterr().err
    assert (tmp_path / "results.json").is_file()


def test_evaluation_runs_without_deepspeed(tiny: TinyRun, tmp_path: Path) -> None:
    law = f"law={tiny.base.parent / 'law'}"
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, "evaluate", tiny.folder, "--text", law, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bits/byte" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "--text NAME=DATASET"),
        (["MODEL", "--text", "law"], "write NAME=DATASET"),
        (["MODEL", "--text", "law=/nowhere"], "/nowhere holds no finished dataset"),
        (["MODEL", "--text", "a=LAW", "--text", "a=WIKI"], "'a' is used for two texts"),
        (["MODEL", "--text", "a=WIKI:train"], "no train documents"),
        (["MODEL", "--text", "a=LAW", "--sequence-length", "257"], "256 positions"),
        (["MODEL", "--text", "a=LAW", "--fail-if-drop", "0.1"], "--compare"),
        (["/nowhere/model", "--text", "a=LAW"], "/nowhere/model"),
    ],
)
def test_what_can_not_be_measured_is_refused_with_the_way_out(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    root = tiny.base.parent
    places = {"MODEL": str(tiny.base), "LAW": str(root / "law"), "WIKI": str(root / "wiki")}
    for key, place in places.items():
        arguments = [argument.replace(key, place) for argument in arguments]
    assert evaluate(*arguments, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_dataset_of_another_tokenizer_is_refused(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny.base, tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace("<|im_end|>", "<|done|>"))
    assert evaluate(other, "--text", f"a={tiny.base.parent / 'law'}", "--output", tmp_path / "out") == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_delta_is_sent_to_export_first(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tiny.folder, tmp_path / "delta", delta=True)
    law = f"a={tiny.base.parent / 'law'}"
    assert evaluate(tmp_path / "delta", "--text", law, "--output", tmp_path / "out") == 2
    assert "llamapro export" in capsys.readouterr().err
