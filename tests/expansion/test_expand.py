"""Expansion against an independent oracle: plain transformers computes the same logits, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llamapro.errors import EXIT_RETRY, CheckFailed, Corrupted, ModelRefused, UserError
from llamapro.expansion.expand import expand
from llamapro.expansion.record import read_record
from llamapro.expansion.verify import verify
from llamapro.files.atomic import STAGING
from tests.support.expansion import all_tensors, flip_bit, logits, update_json
from tests.support.models import save_tiny_llama

MIB = 1 << 20


def assert_same_function(model: Path, base: Path) -> None:
    for cached in (False, True):
        expected, found = logits(base, cached=cached), logits(model, cached=cached)
        assert torch.equal(expected.view(torch.int32), found.view(torch.int32)), f"logits differ, cached={cached}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-base")


@pytest.mark.parametrize(
    ("blocks", "model", "arguments"),
    [
        (4, {}, {"new_blocks": 2}),
        (4, {"tied": True}, {"new_blocks": 2}),
        (5, {}, {"new_blocks": 3}),
        (4, {"dtype": torch.bfloat16}, {"new_blocks": 2}),
        (4, {"max_shard_size": "20KB"}, {"new_blocks": 4}),
        (4, {}, {"new_blocks": 4, "copies_per_group": 2}),
        (3, {}, {"new_blocks": 2, "placement": "suffix"}),
        (3, {}, {"new_blocks": 2, "placement": "prefix"}),
        (3, {}, {"new_blocks": None, "placement": (1, 1, 0)}),
        (4, {"tied": True, "dtype": torch.bfloat16}, {"new_blocks": 1, "dtype": "float32"}),
        (2, {}, {"new_blocks": 2, "max_shard_bytes": 20_000}),
    ],
)
def test_logits_are_those_of_the_base_bit_for_bit(
    tmp_path: Path, blocks: int, model: dict[str, object], arguments: dict[str, object]
) -> None:
    base = save_tiny_llama(tmp_path / "base", blocks=blocks, **model)  # type: ignore[arg-type]
    record = expand(str(base), tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert_same_function(tmp_path / "out", base)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(loaded.model.layers) == record.blocks == blocks + len(record.new_blocks)


def test_identity_is_due_to_the_zeros(base: Path, tmp_path: Path) -> None:
    expand(str(base), tmp_path / "out", new_blocks=2)
    tensors = all_tensors(tmp_path / "out")
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].clone()
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert not torch.equal(logits(base, cached=False), logits(tmp_path / "out", cached=False))


def test_tensors_are_exactly_the_bases_their_copies_and_zeros(base: Path, tmp_path: Path) -> None:
    record = expand(str(base), tmp_path / "out", new_blocks=2, copies_per_group=2)
    assert record.new_blocks == (4, 5)
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    expected = {
        name: value for name, value in before.items() if not name.startswith(("model.layers.4", "model.layers.5"))
    }
    for new, source in ((4, 2), (5, 3)):
        for name, value in before.items():
            if name.startswith(f"model.layers.{source}."):
                rest = name.removeprefix(f"model.layers.{source}.")
                zero = rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
                expected[f"model.layers.{new}.{rest}"] = torch.zeros_like(value) if zero else value
    assert set(after) == set(expected)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert set(record.zeroed) == {name for name, value in after.items() if not value.any()}


def test_biases_of_the_zeroed_projections_are_zeroed_too(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    record = expand(str(tmp_path / "base"), tmp_path / "out", new_blocks=1)
    assert {name.removeprefix("model.layers.2.") for name in record.zeroed} == {
        *("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
    }
    assert all_tensors(tmp_path / "out")["model.layers.2.self_attn.q_proj.bias"].any()
    assert_same_function(tmp_path / "out", tmp_path / "base")


def test_mistral(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.3,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    record = expand(str(tmp_path / "base"), tmp_path / "out", new_blocks=2)
    assert (record.family, record.model_type) == ("llama", "mistral")
    assert_same_function(tmp_path / "out", tmp_path / "base")


def test_greedy_generation_and_saving_again_are_the_bases(base: Path, tmp_path: Path) -> None:
    expand(str(base), tmp_path / "out", new_blocks=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The quick brown", return_tensors="pt")
    texts = []
    for folder in (base, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        texts.append(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert torch.equal(*texts)
    model.save_pretrained(tmp_path / "again")
    assert_same_function(tmp_path / "again", base)


def test_a_tied_model_with_a_head_in_its_file_keeps_both(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=True)
    tensors = all_tensors(base)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": torch.ones(320, 32)}, base / "model.safetensors", {"format": "pt"})
    expand(str(base), tmp_path / "out", new_blocks=1)
    assert torch.equal(all_tensors(tmp_path / "out")["lm_head.weight"], torch.ones(320, 32))
    assert_same_function(tmp_path / "out", base)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_conversion_is_torchs_and_in_the_config(
    base: Path, tmp_path: Path, dtype: str, torch_dtype: torch.dtype
) -> None:
    record = expand(str(base), tmp_path / "out", new_blocks=2, dtype=dtype)
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    for name, digest in record.base_tensors.items():
        assert torch.equal(after[name], before[digest.base_name].to(torch_dtype))
        assert (digest.sha256 == digest.source_sha256) is (dtype == "float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch_dtype


def test_config_and_companions(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    changes = {"use_cache": False, "layer_types": layer_types, "_name_or_path": "/home/me/x", "own_field": [1, 2, 3, 4]}
    update_json(source / "config.json", changes)
    update_json(source / "generation_config.json", {"use_cache": False, "temperature": 0.7})
    for name in ("LICENSE", "NOTICE.md", "modeling_own.py", "optimizer.pt", "README.md"):
        (source / name).write_text(name)
    expand(str(source), tmp_path / "out", new_blocks=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["use_cache"], config["own_field"]) == (6, True, [1, 2, 3, 4])
    assert config["layer_types"] == [layer_types[index] for index in (0, 1, 1, 2, 3, 3)]
    assert "_name_or_path" not in config
    assert config["llamapro"]["new_blocks"] == [2, 5]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["use_cache"], generation["temperature"]) == (True, 0.7)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not names & {"modeling_own.py", "optimizer.pt", "README.md"}
    assert (tmp_path / "out" / "BASE_MODEL_CARD.md").read_text() == "README.md"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.json"))
    assert str(tmp_path).encode() not in written, "a local path was recorded"


def test_code_of_a_known_model_is_neither_run_nor_carried(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    (source / "evil.py").write_text("raise SystemExit('code of the model was run')")
    update_json(source / "config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    expand(str(source), tmp_path / "out", new_blocks=1)
    assert "evil.Model" in capsys.readouterr().err
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "evil.py").exists()
    assert torch.equal(logits(tmp_path / "out", cached=False), logits(base, cached=False))
    assert verify(tmp_path / "out", source).problems == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers is not known"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
    ],
)
def test_a_base_that_cannot_be_expanded_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    update_json(source / "config.json", changes)
    with pytest.raises(ModelRefused, match=words):
        expand(str(source), tmp_path / "out", new_blocks=1)
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize(
    ("blocks", "words"),
    [(3, "there is block 3, which"), (5, "there is block 4, of which"), (None, "num_hidden_layers")],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(
    base: Path, tmp_path: Path, blocks: int | None, words: str
) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    update_json(source / "config.json", {"num_hidden_layers": blocks})
    with pytest.raises(Corrupted, match=words):
        expand(str(source), tmp_path / "out", new_blocks=1)


def test_blocks_without_the_tensors_of_the_zero_rule_are_refused(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    tensors = {name.replace("down_proj", "w2"): value for name, value in all_tensors(base).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelRefused, match=r"no tensor model\.layers\.0\.mlp\.down_proj;"):
        expand(str(source), tmp_path / "out", new_blocks=1)


def test_quantized_tensors_are_refused(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    save_file(
        all_tensors(base) | {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(4, dtype=torch.int32)},
        source / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelRefused, match="qweight is I32"):
        expand(str(source), tmp_path / "out", new_blocks=1)


def test_a_rule_that_was_broken_while_writing_keeps_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llamapro.expansion.expand.filled_chunks", lambda dtype, value, nbytes: iter([b"\1" + bytes(nbytes - 1)])
    )
    with pytest.raises(CheckFailed, match=r"zero rule.*model\.layers\.4"):
        expand(str(base), tmp_path / "out", new_blocks=1)
    assert os.listdir(tmp_path) == []


def test_an_existing_target_the_base_itself_and_a_full_disk_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand(str(base), tmp_path / "out", new_blocks=1)
    with pytest.raises(UserError, match="--overwrite"):
        expand(str(base), tmp_path / "out", new_blocks=2)
    expand(str(base), tmp_path / "out", new_blocks=2, overwrite=True)
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.blocks == 6
    for target in (base, base / "inside"):
        with pytest.raises(UserError, match="the base itself"):
            expand(str(base), target, new_blocks=1, overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="free some space"):
        expand(str(base), tmp_path / "other", new_blocks=1)
    assert os.listdir(tmp_path) == ["out"]


def test_pickles_only_on_request_and_then_the_same_result(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    shutil.copytree(base, source)
    torch.save(all_tensors(base), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match="--allow-pickle"):
        expand(str(source), tmp_path / "out", new_blocks=1)
    expand(str(source), tmp_path / "out", new_blocks=1, allow_pickle=True)
    assert_same_function(tmp_path / "out", base)
    assert sorted(os.listdir(tmp_path)) == ["out", "pickled"]


def test_a_pickle_that_would_run_code_is_refused(base: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    source = tmp_path / "pickled"
    shutil.copytree(base, source)
    (source / "model.safetensors").unlink()
    torch.save({"x": Payload()}, source / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match="can't be loaded as plain weights"):
        expand(str(source), tmp_path / "out", new_blocks=1, allow_pickle=True)
    assert os.listdir(tmp_path) == ["pickled"]


def test_an_expanded_base_that_differs_from_its_record_is_refused(base: Path, tmp_path: Path) -> None:
    expand(str(base), tmp_path / "one", new_blocks=1)
    expand(str(tmp_path / "one"), tmp_path / "two", new_blocks=1)
    assert_same_function(tmp_path / "two", base)
    flip_bit(tmp_path / "one", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(Corrupted, match=r"model\.layers\.1\.mlp\.up_proj\.weight differs"):
        expand(str(tmp_path / "one"), tmp_path / "three", new_blocks=1)


@pytest.fixture(scope="module")
def large_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 MiB of zeros in four blocks: a sparse file, made with the header only."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, folder)
    header: dict[str, object] = {}
    offset = 0
    for block in range(4):
        for rest in ("self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
            end = offset + 17 * MIB
            item = {"dtype": "BF16", "shape": [17, MIB // 2], "data_offsets": [offset, end]}
            header[f"model.layers.{block}.{rest}"] = item
            offset = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return folder


EXPAND = "import sys; from pathlib import Path; from llamapro.expansion.expand import expand\n"


def test_memory_stays_small_and_torch_stays_out(large_base: Path, tmp_path: Path) -> None:
    code = EXPAND + (
        "expand(sys.argv[1], Path(sys.argv[2]), new_blocks=2)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        # Not getrusage: its maximum is inherited from the process that started this one.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(large_base), str(tmp_path / "out")]
    peak_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak_kib < 120 * 1024, f"{peak_kib} KiB for a model of {204 * 1024} KiB"
    shutil.rmtree(tmp_path / "out")


def start_expansion(base: Path, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "llamapro", "expand", str(base), str(out), "--new-blocks", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_weights(out: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(f".{out.name}{STAGING}*/model.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_expansion_leaves_nothing_that_looks_finished(large_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = time.monotonic()
    process = start_expansion(large_base, out)
    wait_for_weights(out)
    begins = time.monotonic() - started
    assert process.wait() == 0
    takes = time.monotonic() - started - begins
    finished = all_tensors(out)
    random = Random(0)
    for _ in range(4):
        shutil.rmtree(out, ignore_errors=True)
        process = start_expansion(large_base, out)
        wait_for_weights(out)
        time.sleep(random.random() * takes)
        process.kill()
        process.wait()
        # Only a kill after the very last step may find the model there, and then all of it.
        assert not out.exists() or all_tensors(out).keys() == finished.keys()
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["out"] * out.exists()
    expand(str(large_base), out, new_blocks=1, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    shutil.rmtree(out)


def test_an_interrupted_expansion_ends_at_once_and_cleans_up(large_base: Path, tmp_path: Path) -> None:
    process = start_expansion(large_base, tmp_path / "out")
    wait_for_weights(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == EXIT_RETRY
    assert os.listdir(tmp_path) == []


def test_an_error_while_writing_is_raised_as_it_is_and_keeps_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        expand(str(base), tmp_path / "out", new_blocks=1)
    assert os.listdir(tmp_path) == []


def test_a_base_that_is_cut_short_meanwhile_is_named_and_nothing_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    # The disk is checked after the headers of the base, before its tensors are read.
    monkeypatch.setattr(
        "llamapro.expansion.expand.require_free_space",
        lambda *facts: os.truncate(source / "model.safetensors", 20_000),
    )
    with pytest.raises(Corrupted, match="cut short while it was read"):
        expand(str(source), tmp_path / "out", new_blocks=1)
    assert os.listdir(tmp_path) == ["base"]
