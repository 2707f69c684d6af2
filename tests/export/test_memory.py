"""An export streams: the memory it takes does not grow with the number of blocks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamapro.expansion.expand import expand
from llamapro.files.tensors import TensorFolder
from tests.data_tools.test_memory import MEASURED
from tests.support.exports import block_of, random_masters, write_checkpoint, write_run_files
from tests.support.models import tiny_tokenizer
from tests.support.source import ROOT

MIB = 1 << 20
PROGRAM = (
    "import sys; from pathlib import Path; from llamapro.export.export import export; "
    "export(Path(sys.argv[1]), Path(sys.argv[2]))"
)


def make_run(folder: Path, blocks: int) -> Path:
    """A model of some MiB per block, half of its new blocks again as many, and a checkpoint of those."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="40MB")
    tiny_tokenizer().save_pretrained(folder / "base")
    record = expand(str(folder / "base"), folder / "model", new_blocks=blocks // 2, base_id="tests/wide")
    shapes = {name: entry.shape for name, entry in TensorFolder.open(folder / "model").entries.items()}
    trained = {name: shape for name, shape in shapes.items() if block_of(record, name) in record.new_blocks}
    write_checkpoint(folder / "run", random_masters(trained), record)
    write_run_files(folder / "run", folder / "model")
    return folder / "run"


def peak_bytes(run: Path, output: Path) -> int:
    """The largest resident memory of an export's process."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURED, "-c", PROGRAM, str(run), str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) << 10


@pytest.mark.slow
def test_six_times_the_blocks_take_no_more_memory(tmp_path: Path) -> None:
    small = peak_bytes(make_run(tmp_path / "small", 4), tmp_path / "small-out")
    large = peak_bytes(make_run(tmp_path / "large", 24), tmp_path / "large-out")
    written = sum(path.stat().st_size for path in (tmp_path / "large-out").glob("*.safetensors"))
    before = sum(path.stat().st_size for path in (tmp_path / "small-out").glob("*.safetensors"))
    assert written - before > 150 * MIB
    assert large - small < (written - before) / 4, (small, large)
