"""Export against what an independent reader of the same files says: safetensors, torch's cast, plain transformers."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llamapro.errors import CheckFailed, Corrupted, UserError
from llamapro.expansion.expand import expand
from llamapro.expansion.record import read_record
from llamapro.expansion.verify import verify
from llamapro.export.export import export
from llamapro.modeling.build import build_model
from llamapro.modeling.trainable import TrainableSet
from tests.support.expansion import flip_bit
from tests.support.exports import (
    STEP,
    TinyRun,
    block_of,
    files_of,
    make_run,
    random_masters,
    tensors_of,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tiny"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_trained_tensors_are_torchs_cast_of_the_masters_and_all_others_the_folders_bits(
    tiny: TinyRun, tmp_path: Path
) -> None:
    export(tiny.folder, tmp_path / "out")
    before, after = tensors_of(tiny.model), tensors_of(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        expected = tiny.masters[name].to(torch.bfloat16) if name in tiny.masters else before[name]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(bits(tensor), bits(expected)), name


def test_rounding_is_to_nearest_even_at_exact_halves(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    name = next(iter(tiny.masters))
    halves = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -(1.0 + 2**-8), 0.0])
    masters = tiny.masters | {name: halves.repeat(tiny.masters[name].numel() // 4).reshape(tiny.masters[name].shape)}
    write_checkpoint(tiny.folder, masters, tiny.record, step=STEP + 1)
    export(tiny.folder, tmp_path / "out")
    assert tensors_of(tmp_path / "out")[name].flatten()[:4].tolist() == [1.0, 1.0 + 2**-6, -1.0, 0.0]


def test_float32_keeps_the_masters_and_widens_the_base_exactly(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "out", dtype="float32")
    before, after = tensors_of(tiny.model), tensors_of(tmp_path / "out")
    for name, tensor in after.items():
        assert torch.equal(tensor, tiny.masters[name] if name in tiny.masters else before[name].float()), name
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_a_flipped_bit_of_a_trained_tensor_is_named_by_verify_and_refused_when_it_is_built_on(
    tiny: TinyRun, tmp_path: Path
) -> None:
    export(tiny.folder, tmp_path / "out")
    assert not verify(tmp_path / "out", None).problems
    name = next(iter(tiny.masters))
    flip_bit(tmp_path / "out", name)
    assert verify(tmp_path / "out", None).problems == (f"{name} differs from what was exported (SHA-256)",)
    record = read_record(tmp_path / "out")
    with pytest.raises(Corrupted, match=name):
        build_model(
            tmp_path / "out",
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            trainable=TrainableSet.all(),
            record=record,
        )


def test_record_says_what_was_trained_and_describes_the_bytes_written(tiny: TinyRun, tmp_path: Path) -> None:
    for dtype in ("keep", "float32"):
        out = tmp_path / dtype
        export(tiny.folder, out, dtype=dtype)
        record = read_record(out)
        assert record is not None
        assert record.trained.blocks == tiny.record.new_blocks
        assert record.trained.tensors == ()
        again = make_digests(out)
        assert {name: digest.sha256 for name, digest in record.base_tensors.items()} == {
            name: again[name] for name in record.base_tensors
        }
    kept = read_record(tmp_path / "keep")
    assert kept is not None
    assert kept.digest() == tiny.record.digest()


def make_digests(folder: Path) -> dict[str, str]:
    raw = {name: bits(tensor).numpy().tobytes() for name, tensor in tensors_of(folder).items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in raw.items()}


def test_training_everything_is_recorded_and_tied_heads_stay_tied(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, tied=True, everything=True)
    export(tiny.folder, tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.trained.blocks == tuple(range(6))
    assert set(record.trained.tensors) == {name for name in tiny.masters if block_of(record, name) is None}
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert torch.equal(
        tensors_of(tmp_path / "out")["model.embed_tokens.weight"],
        tiny.masters["model.embed_tokens.weight"].to(torch.bfloat16),
    )


def test_plain_transformers_loads_and_generates_in_a_fresh_process(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "out")
    program = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(report.values()), report\n"
        "assert model.config.use_cache and model.config.num_hidden_layers == 6\n"
        "inputs = tokenizer('The quick brown', return_tensors='pt')\n"
        "print(model.generate(**inputs, max_new_tokens=5, do_sample=False).shape[1] - inputs['input_ids'].shape[1])\n"
        "assert tokenizer.chat_template and 'llamapro' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 5


def test_companion_files_are_copied_and_config_changes_only_in_the_record(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "out")
    before, after = files_of(tiny.model), files_of(tmp_path / "out")
    assert {name for name in before if before[name] != after.get(name)} == {
        "model.safetensors",
        "config.json",
        "expansion.json",
    }
    assert set(after) - set(before) == {"README.md"}
    config = {name: orjson.loads(files["config.json"]) for name, files in (("old", before), ("new", after))}
    assert config["new"].pop("llamapro")["trained"]["blocks"] == list(tiny.record.new_blocks)
    config["old"].pop("llamapro")
    assert config["new"] == config["old"]
    assert config["new"]["use_cache"] is True


def test_base_tensor_with_one_flipped_bit_stops_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    flip_bit(tiny.model, name)
    with pytest.raises(Corrupted, match=name):
        export(tiny.folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_missing_base_tensor_is_named(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    tensors = tensors_of(tiny.model)
    del tensors["model.norm.weight"]
    save_file(tensors, tiny.model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Corrupted, match=r"model\.norm\.weight"):
        export(tiny.folder, tmp_path / "out")


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    expand(str(tiny.base), tmp_path / "other", new_blocks=1)
    with pytest.raises(CheckFailed, match="--model"):
        export(tiny.folder, tmp_path / "out", model=tmp_path / "other")
    plain = write_checkpoint(tmp_path / "plain", random_masters({"model.norm.weight": (31,)}), None)
    with pytest.raises(UserError, match=r"model\.norm\.weight \[31\]"):
        export(plain, tmp_path / "out", model=tiny.base)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    file = tiny.checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(Corrupted, match="rank-00000"):
        export(tiny.folder, tmp_path / "out")


def test_run_exports_its_newest_checkpoint_and_a_named_one_exports_itself(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    newer = {name: master + 1 for name, master in tiny.masters.items()}
    write_checkpoint(tiny.folder, newer, tiny.record, step=STEP + 8)
    name = next(iter(newer))
    assert export(tiny.folder, tmp_path / "newest").step == STEP + 8
    assert export(tiny.checkpoint, tmp_path / "named").step == STEP
    assert torch.equal(tensors_of(tmp_path / "newest")[name], newer[name].to(torch.bfloat16))
    assert torch.equal(tensors_of(tmp_path / "named")[name], tiny.masters[name].to(torch.bfloat16))


def test_plain_model_without_record_exports_whole_but_not_as_delta(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    masters = random_masters({"model.norm.weight": (32,)})
    checkpoint = write_checkpoint(tmp_path / "sft", masters, None)
    export(checkpoint, tmp_path / "out", model=tiny.base)
    assert not (tmp_path / "out/expansion.json").exists()
    assert torch.equal(tensors_of(tmp_path / "out")["model.norm.weight"], masters["model.norm.weight"].bfloat16())
    with pytest.raises(UserError, match="never expanded"):
        export(checkpoint, tmp_path / "delta", model=tiny.base, delta=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "x"}, "--base is for deltas"),
        ({"model": Path("/nowhere")}, "/nowhere does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tiny: TinyRun, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(tiny.folder, tmp_path / "out", **options)  # type: ignore[arg-type]


def test_occupied_target_needs_overwrite(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        export(tiny.folder, tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    export(tiny.folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/notes.txt").exists()
    with pytest.raises(UserError, match="model folder itself"):
        export(tiny.folder, tiny.model, overwrite=True)


def test_run_without_a_checkpoint_and_a_stray_folder_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="neither a run folder"):
        export(tmp_path, tmp_path / "out")


def test_written_safetensors_carry_the_format_transformers_asks_for(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_killed_export_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(
    tiny: TinyRun, tmp_path: Path
) -> None:
    program = (
        "import contextlib, os, signal, sys\n"
        "from pathlib import Path\n"
        "from llamapro import console\n"
        "from llamapro.export.export import export\n"
        "seen = []\n"
        "def advance(amount):\n"
        "    seen.append(amount)\n"
        "    if len(seen) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "console.progress = lambda *ignored: contextlib.nullcontext(advance)\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny.folder, tmp_path / "out"], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert [path.name.startswith(".out.staging-") for path in tmp_path.iterdir()] == [True]
    export(tiny.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
