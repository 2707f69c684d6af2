"""`llamapro plan` prints the paper's figures for the paper's model, and says what it assumes."""

from pathlib import Path

import orjson
import pytest

from llamapro.cli.main import main
from llamapro.expansion.expand import expand
from tests.support.config import minimal_values
from tests.support.models import save_tiny_llama

LLAMA2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "llama2"
    folder.mkdir()
    (folder / "config.json").write_bytes(orjson.dumps(LLAMA2_7B))
    return folder


def cells(page: str, label: str) -> list[str]:
    """The cells of the table's row with this label."""
    (line,) = [line for line in page.splitlines() if line.strip().startswith(label)]
    return [cell.strip() for cell in line.split("│")[1:]]


def test_expansions_stand_side_by_side(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(base), "--new-blocks", "4,8,16", "--gpus", "16", "--gpu", "h100"]) == 0
    out, err = capsys.readouterr()
    assert cells(out, "parameters that learn") == ["809,533,440", "1,619,066,880", "3,238,133,760"]
    assert cells(out, "GFLOP per token")[1] == "38.28"
    assert cells(out, "ZeRO stage") == ["1", "1", "1"]
    speed = [float(cell.replace(",", "")) for cell in cells(out, "tokens/s per GPU")]
    hours = [float(cell.replace(",", "")) for cell in cells(out, "GPU-hours")]
    assert speed[0] > speed[1] > speed[2] and hours[0] < hours[1] < hours[2]
    for assumption in ("989 TFLOP/s", "73% in linears", "37% forward", "3.35 TB/s", "50 GB/s", "71.10 GiB"):
        assert assumption in err
    assert out.count("largest micro-batch") == 3


def test_without_a_gpu_no_speed_is_made_up(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(base), "--new-blocks", "8"]) == 0
    out, err = capsys.readouterr()
    assert cells(out, "tokens/s per GPU") == ["n/a"]
    assert "--gpu" in err


def test_a_small_memory_raises_the_stage_and_says_when_nothing_fits(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", str(base), "--new-blocks", "8", "--gpus", "16", "--gpu-memory-gib"]
    assert main([*command, "24"]) == 0
    assert cells(capsys.readouterr().out, "ZeRO stage") == ["3"]
    assert main([*command, "7"]) == 0
    out, err = capsys.readouterr()
    assert "too much" in out and "doesn't fit in 6.30 GiB" in err and "ZeRO-3 over" in err


def test_a_stated_rate_and_efficiency_replace_the_tables(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(base), "--new-blocks", "8", "--gpu", "h200"]
    speeds = []
    for more in ([], ["--gpu-bf16-tflops", "790"], ["--gpu-bf16-tflops", "790", "--efficiency", "1.0"]):
        assert main([*command, *more]) == 0
        out, err = capsys.readouterr()
        speeds.append(float(cells(out, "tokens/s per GPU")[0].replace(",", "")))
    assert speeds[1] < speeds[0] < speeds[2]
    assert "790 TFLOP/s" in err and "100% in linears" in err


def test_a_run_is_planned_from_its_configuration_without_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expand(str(save_tiny_llama(tmp_path / "base")), tmp_path / "grown", new_blocks=2)
    values = minimal_values(
        model={"path": str(tmp_path / "grown")},
        data={"sequence_length": 64},
        batch={"global_sequences": 8},
        schedule={"steps": 1000},
    )
    (tmp_path / "run.yaml").write_bytes(orjson.dumps(values))
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--gpus", "2", "--gpu", "a100"]) == 0
    out = capsys.readouterr().out
    assert "2 of 6" in out and "0.000512 billion" in out
    for item in ("gradients", "communication buffers", "activations, frozen", "activations, trainable", "logits"):
        assert len(cells(out, item)) == 3
    assert float(cells(out, "hardware (HFU)")[0]) > float(cells(out, "model (MFU)")[0])
    assert [len(cells(out, kind)) for kind in ("linears", "glue", "communication  ")] == [3, 3, 3]
    assert cells(out, "recomputed") == ["no block"]
    values["engine"], values["batch"]["micro_sequences"] = {"activation_memory_gib": 5e-4}, 4
    (tmp_path / "run.yaml").write_bytes(orjson.dumps(values))
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--gpus", "2", "--gpu", "a100"]) == 0
    (recomputed,) = cells(capsys.readouterr().out, "recomputed")
    assert "of 4 blocks, +" in recomputed


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--gpu", "h300"], "did you mean"),
        (["--gpus", "0"], "at least 1"),
        (["--efficiency", "1.5"], "between 0 and 1"),
        (["--gpu-memory-gib", "-3"], "more than 0"),
        (["--gpu-bf16-tflops", "700"], "name it"),
    ],
)
def test_what_can_not_be_planned_is_refused(
    base: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(base), "--new-blocks", "8", *words]) == 2
    assert part in capsys.readouterr().err


def test_a_model_needs_numbers_of_blocks(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(base)]) == 2
    assert "--new-blocks" in capsys.readouterr().err
