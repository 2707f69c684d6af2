"""The GPU benchmark runs from end to end without one, and its page says what was measured."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from benchmarks import train_gpu
from benchmarks.train_gpu import CEILINGS, COLUMNS, REFERENCE, VARIANTS, report, with_memory

ROOT = Path(__file__).parents[2]
OUT_OF_MEMORY = {"failed": ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."]}


def run(results: Path, device: str, variants: str) -> dict[str, Any]:
    """The command at the tiny shape, and the JSON that it wrote."""
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--device", device, "--shape", "tiny", "--steps", "2"]
    command += ["--warmup", "1", "--variants", variants, "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = orjson.loads((results / f"train-{device}-tiny.json").read_bytes())
    return found


@pytest.mark.gpu
def test_every_variant_runs_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    facts = run(tmp_path, "cuda", ",".join((CEILINGS, REFERENCE, *VARIANTS)))
    failed = {name: found["failed"] for name, found in facts["variants"].items() if "failed" in found}
    assert not failed or set(failed) <= {"fp8", "fp8-eager"}


def test_it_runs_on_the_cpu_in_one_command(tmp_path: Path) -> None:
    facts = run(tmp_path, "cpu", f"{CEILINGS},{REFERENCE},eager")
    assert facts["variants"].keys() == {CEILINGS, REFERENCE, "eager"}
    ours, reference = facts["variants"]["eager"], facts["variants"][REFERENCE]
    assert ours["tokens_per_second"] > 0 < reference["tokens_per_second"]
    assert len(ours["seconds"]["all"]) == facts["steps"] == 2
    assert ours["hardware_flops_per_token"] > ours["model_flops_per_token"]
    assert facts["variants"][CEILINGS]["matrix_flops"] > 0
    page = (tmp_path / "train-cpu-tiny.md").read_text()
    assert all(column in page for column in COLUMNS) and "failed" not in page


def test_a_micro_batch_that_is_too_large_is_halved_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_process(_: argparse.Namespace, variant: str, micro: int | None) -> dict[str, Any]:
        return OUT_OF_MEMORY if micro is None or micro > 2 else {"tokens_per_second": 1.0, "micro_sequences": micro}

    monkeypatch.setattr(train_gpu, "in_process", in_process)
    arguments = argparse.Namespace(micro_sequences=None, first_micro=8)
    assert with_memory(arguments, "eager") == {"tokens_per_second": 1.0, "micro_sequences": 2, "too_large": [8, 4]}


def test_what_failed_stands_in_the_table() -> None:
    facts = {
        "date": "", "device": "", "versions": {}, "steps": 1, "warmup": 1,
        "shape": {"name": "x", "num_hidden_layers": 1, "hidden_size": 1, "new_blocks": [], "sequence_length": 1},
        "variants": {"eager": OUT_OF_MEMORY},
    }  # fmt: skip
    assert "| eager | failed |" in report(facts)


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpu.main(["--variants", "fast"])
    assert "no variant fast" in capsys.readouterr().err
