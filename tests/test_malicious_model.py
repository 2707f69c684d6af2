"""Nothing in a model folder is ever run, whatever command reads it; what selects code is refused, never obeyed.

Every planted payload would leave a file behind when it ran. That it would is shown first, by the loaders that run it.
"""

import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoConfig

from llamapro.cli.main import main
from llamapro.errors import Corrupted, LlamaproError
from llamapro.expansion.expand import expand
from llamapro.files.tensors import TensorFolder
from llamapro.ranks import Ranks
from llamapro.training.entry import main as train_main
from tests.support.expansion import update_json
from tests.support.models import save_tiny_llama
from tests.support.pool import WorkerPool
from tests.support.source import ROOT
from tests.support.training import prepare, prepare_around_base, run_training, settings

TIMEOUT_SECONDS = 300
CODE_NAMES = (
    *("modeling_own.py", "configuration_own.py", "tokenization_own.py", "__init__.py", "conftest.py", "setup.py"),
    *("sitecustomize.py", "custom_generate/generate.py", "model.safetensors.py"),
)
PICKLE_NAMES = (
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"),
    *("adapter_model.bin", "model.pkl", "mp_rank_00_model_states.pt", "packs.npz", "tokenizer.npy"),
)
OWN_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def plant(folder: Path, canary: Path) -> None:
    """Put code and pickles with the payload into a folder, under every name that some library looks for."""
    for name in CODE_NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    for name in PICKLE_NAMES:
        (folder / name).write_bytes(pickle.dumps({"x": Payload(canary)}))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that a payload would leave; shown to work before anything is tested with it."""
    path = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def infested(tmp_path: Path, canary: Path) -> Path:
    """A base that is sound, among everything that could be run."""
    base = save_tiny_llama(tmp_path / "base")
    plant(base, canary)
    update_json(base / "config.json", {"auto_map": OWN_CODE})
    return base


def test_the_planted_code_is_run_by_who_trusts_it(
    infested: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    update_json(infested / "config.json", {"model_type": "own"})
    with pytest.raises(AttributeError, match="OwnConfig"):
        AutoConfig.from_pretrained(infested, trust_remote_code=True)
    assert canary.exists()


def test_from_the_base_to_the_report_nothing_beside_the_weights_is_run(infested: Path, canary: Path) -> None:
    folder = prepare_around_base(infested.parent)
    plant(folder / "expanded", canary)
    config = folder / "run.yaml"
    config.write_bytes(orjson.dumps(settings(folder, schedule={"steps": 2})))
    text = folder / "text.jsonl"
    text.write_bytes(b"".join(orjson.dumps({"text": f"Sentence number {n}. " * 9}) + b"\n" for n in range(20)))
    base, expanded, exported = (str(folder / name) for name in ("base", "expanded", "exported"))
    for words in (
        ["inspect", base],
        ["verify", expanded, "--base", base],
        ["plan", "--model", base, "--new-blocks", "1"],
        ["data", "build", "--input", str(text), "--tokenizer", base, "--output", str(folder / "built")],
        ["export", str(folder / "run"), exported],
        ["evaluate", exported, "--text", f"law={folder / 'law'}:heldout", "--output", str(folder / "evaluated")],
        ["report", str(folder / "run")],
    ):
        if words[0] == "export":
            train = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(config)]
            subprocess.run(train, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
        assert main(words) == 0, words
        assert not canary.exists(), words
    planted = {Path(name).name for name in (*CODE_NAMES, *PICKLE_NAMES)}
    assert not planted & {path.name for path in Path(exported).rglob("*")}


# What is written into config.json, and the field that the refusal names.
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "own code": ({"model_type": "own", "auto_map": OWN_CODE}, "auto_map"),
    "kernel of the hub": ({"_attn_implementation": "org/kernel"}, "_attn_implementation"),
    "kernel, inner name": ({"_attn_implementation_internal": "org/kernel:f"}, "_attn_implementation_internal"),
    "kernel, public name": ({"attn_implementation": "org/kernel"}, "attn_implementation"),
    "kernel for experts": ({"experts_implementation": "org/kernel"}, "experts_implementation"),
    "nested": ({"text_config": {"_attn_implementation": "org/kernel"}}, "_attn_implementation"),
    "unknown private field": ({"_not_known": ["x"]}, "_not_known"),
    "pipeline": ({"custom_pipelines": {"p": {"impl": "modeling_own.P"}}}, "custom_pipelines"),
    "trust": ({"trust_remote_code": True}, "trust_remote_code"),
    "other weights": ({"transformers_weights": "pytorch_model.bin"}, "transformers_weights"),
}


def commands(folder: Path, tmp_path: Path) -> list[list[str]]:
    """Every command that reads a model folder."""
    model, out = str(folder), str(tmp_path / "out")
    text = f"law={tmp_path / 'law'}:heldout"
    return [
        ["expand", model, out, "--new-blocks", "1"],
        ["inspect", model],
        ["verify", model, "--base", model, "--identity"],
        ["plan", "--model", model, "--new-blocks", "1"],
        ["evaluate", model, "--text", text, "--output", out],
    ]


@pytest.mark.parametrize("kind", FIELDS)
def test_a_config_that_selects_code_is_refused_by_every_command(
    infested: Path, canary: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, named = FIELDS[kind]
    folder = prepare_around_base(tmp_path)
    for model in (infested, folder / "expanded"):
        update_json(model / "config.json", fields)
    for words in commands(infested, tmp_path):
        assert main(words) in (1, 2), words
        assert not canary.exists() and not list(tmp_path.glob("out/*")), words
    config = folder / "run.yaml"
    config.write_bytes(orjson.dumps(settings(folder)))
    capsys.readouterr()
    assert train_main("pretrain", ["--config", str(config)]) == 2
    assert f"config.json: {named}" in capsys.readouterr().err
    assert not canary.exists() and not (folder / "run").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_code_named_beside_the_config_is_refused(infested: Path, canary: Path, tmp_path: Path, name: str) -> None:
    update_json(infested / name, {"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}})
    for words in commands(infested, tmp_path):
        assert main(words) in (1, 2), words
        assert not canary.exists() and not list(tmp_path.glob("out/*")), words


def as_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Payload(canary)}))


def as_torch_archive(path: Path, canary: Path) -> None:
    torch.save({"x": Payload(canary)}, path)


def as_weights_with_an_archive_behind(path: Path, canary: Path) -> None:
    """Two formats in one file: a header in front, and a directory of zip at the end."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Payload(canary)}))
    assert zipfile.is_zipfile(path)


def as_archive_with_paths_upwards(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"../{canary.name}", b"written outside")


def as_link_to_a_pickle_outside(path: Path, canary: Path) -> None:
    outside = path.parent.parent / "outside.bin"
    as_pickle(outside, canary)
    path.unlink()
    path.symlink_to(outside)


def as_endless_header(path: Path, canary: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def as_deep_header(path: Path, canary: Path) -> None:
    raw = b'{"x":' * 100_000 + b"1" + b"}" * 100_000
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


def as_header_beyond_its_file(path: Path, canary: Path) -> None:
    raw = orjson.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


@pytest.mark.parametrize(
    "disguise",
    [
        as_pickle,
        as_torch_archive,
        as_weights_with_an_archive_behind,
        as_archive_with_paths_upwards,
        as_link_to_a_pickle_outside,
        as_endless_header,
        as_deep_header,
        as_header_beyond_its_file,
    ],
)
def test_weights_that_are_something_else_are_refused_unread(
    infested: Path, canary: Path, tmp_path: Path, disguise: Callable[[Path, Path], None]
) -> None:
    disguise(infested / "model.safetensors", canary)
    for words in (*commands(infested, tmp_path), ["expand", str(infested), str(tmp_path / "out"), "--new-blocks", "1",
                                                  "--allow-pickle"]):  # fmt: skip
        if words[0] != "plan":  # which reads config.json alone
            assert main(words) in (1, 2), words
        assert not canary.exists() and not list(tmp_path.glob("out/*")), words
    with pytest.raises(Corrupted):
        TensorFolder.open(infested)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/../../outside.safetensors", ".."])
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    base = save_tiny_llama(tmp_path / "base")
    shutil.copy(base / "model.safetensors", tmp_path / "outside.safetensors")
    tensors = TensorFolder.open(base).entries
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (base / "model.safetensors.index.json").write_bytes(orjson.dumps(index))
    with pytest.raises(LlamaproError, match="which is no file in"):
        expand(str(base), tmp_path / "out", new_blocks=1)


def test_a_run_never_unpickles_anything(tmp_path: Path, pool: WorkerPool) -> None:
    """Start, save, resume at another ZeRO stage and world size, while the unpicklers of Python and torch refuse."""
    folder = prepare(tmp_path)
    values = settings(folder, schedule={"steps": 4}, checkpoint={"every_steps": 2}, validation={"every_steps": 2})
    pool.run(train_without_pickle, values, world_size=2)
    values["engine"]["zero_stage"] = 3
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    pool.run(train_without_pickle, values, world_size=1)
    assert (folder / "run" / "checkpoints" / "step-00000004").is_dir()


def train_without_pickle(ranks: Ranks, values: dict[str, Any]) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something is unpickled")

    with pytest.MonkeyPatch.context() as patch:
        for place in ("pickle.load", "pickle.loads", "torch.load", "torch.serialization.load"):
            patch.setattr(place, refuse)
        patch.setattr("pickle.Unpickler", type("Refusing", (pickle.Unpickler,), {"load": refuse}))
        run_training(ranks, values)


def test_deepspeeds_own_loader_is_held_to_plain_weights(tmp_path: Path, pool: WorkerPool, canary: Path) -> None:
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Payload(canary)}, file)
    (without,) = pool.run(load_as_deepspeed_does, str(file), False, world_size=1)
    assert without == "" and canary.exists(), "without the rule the payload runs"
    canary.unlink()
    (refusal,) = pool.run(load_as_deepspeed_does, str(file), True, world_size=1)
    assert "Weights only load failed" in refusal
    assert not canary.exists()


def load_as_deepspeed_does(ranks: Ranks, file: str, as_we_start_it: bool) -> str:
    """Load a file with the function behind DeepSpeed's `load_checkpoint`; what it says when it refuses."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # type: ignore

    with pytest.MonkeyPatch.context() as patch:
        if not as_we_start_it:
            patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        try:
            TorchCheckpointEngine().load(file)
        except pickle.UnpicklingError as error:
            return str(error)
    return ""
