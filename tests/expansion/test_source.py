"""Where a model comes from: code, quantization and foreign weights refused; companions copied, executables never."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from safetensors.torch import save_file

from llamapro.errors import Corrupted, ModelRefused, UserError
from llamapro.expansion.expand import expand
from llamapro.expansion.source import (
    base_name_of,
    companion_files,
    hub_repository,
    own_code,
    read_config,
    refuse_other_weights,
    resolve_model,
)
from llamapro.expansion.verify import verify
from tests.support.expansion import all_tensors, logits
from tests.support.hub import COMMIT, Hub, served
from tests.support.models import save_tiny_llama


def folder_with(folder: Path, config: object, tokenizer_config: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map points to code"),
        ({"_attn_implementation": "org/kernel"}, "_attn_implementation"),
        ({"_attn_implementation_internal": "org/kernel"}, "_attn_implementation_internal"),
        ({"attn_implementation": "org/kernel"}, "attn_implementation"),
        ({"_experts_implementation": {"": "org/kernel"}}, "_experts_implementation"),
        ({"_anything": "x"}, "_anything"),
        ({"text_config": {"_attn_implementation": "org/kernel"}}, "_attn_implementation"),
        ({"custom_pipelines": {"p": {"impl": "own.P"}}}, "custom_pipelines"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
        ({"quantization_config": "odd"}, "quantized .odd."),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantized .fp8."),
        ({"trust_remote_code": True}, "trust_remote_code points to code"),
        ({"transformers_weights": "other.safetensors"}, "chooses other weights"),
    ],
)
def test_configs_that_select_code_or_quantization_are_refused(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelRefused, match=words):
        read_config(folder_with(tmp_path, config))


def test_own_code_of_a_type_that_transformers_knows_is_left_out(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"model_type": "phi3", "auto_map": {"AutoModel": "modeling_phi3.Phi3Model"}})
    assert read_config(folder) == {"model_type": "phi3"}
    assert own_code(folder) == "modeling_phi3.Phi3Model"


def test_code_in_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="tokenizer_config.json: auto_map"):
        read_config(folder_with(tmp_path, {}, {"auto_map": {"AutoTokenizer": ["own.T", None]}}))


def test_code_in_the_generation_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"auto_map": {"x": "own.G"}}))
    with pytest.raises(ModelRefused, match="generation_config.json: auto_map"):
        read_config(folder_with(tmp_path, {}))


def test_the_kind_of_cache_is_no_code(tmp_path: Path) -> None:
    assert read_config(folder_with(tmp_path, {"cache_implementation": "hybrid"}))


def test_harmless_private_fields_are_accepted(tmp_path: Path) -> None:
    config = {"_name_or_path": "/x", "_commit_hash": "1", "_attn_implementation_autoset": True}
    assert read_config(folder_with(tmp_path, config, {"chat_template": "x"})) == config


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="not a Hugging Face model folder$"):
        read_config(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelRefused, match="GGUF, which only `llamapro expand` takes"):
        read_config(tmp_path)
    for raw in ("{", "[]"):
        (tmp_path / "config.json").write_text(raw)
        with pytest.raises(Corrupted, match=r"config\.json"):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "--allow-pickle"),
        ("model.gguf", "GGUF"),
        ("model.pt", "holds neither"),
    ],
)
def test_other_weights_are_refused_with_the_way_out(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ModelRefused, match=words):
        refuse_other_weights(tmp_path)
    (tmp_path / "model.safetensors").touch()
    refuse_other_weights(tmp_path)


@pytest.mark.parametrize("given", ["no such folder", "a/b/c", "/no/such", "", "../x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        resolve_model(given)


def test_a_gguf_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="only `llamapro expand` takes"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a sharded model, and much that has no business in a download."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("repository") / "model", max_shard_size="60KB")
    for name in ("modeling_own.py", "tokenizer_own.py", "consolidated.safetensors", "training_args.pt", "README.md"):
        (folder / name).write_text("raise SystemExit")
    for name in ("original/params.json", "pytorch_model.bin", "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_a_hub_model_is_fetched_without_code_and_expanded(repository: Path, tmp_path: Path) -> None:
    hub = Hub(repository)
    with served(hub, tmp_path / "cache"):
        record = expand("org/model@main", tmp_path / "out", new_blocks=2, allow_pickle=True)
        shards = {path.name for path in repository.glob("model-*.safetensors")}
        assert len(shards) > 1
        others = {
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "chat_template.jinja",
            "README.md",
        }
        assert hub.fetched == shards | others | {"tokenizer.json", "tokenizer_config.json", "LICENSE"}
        snapshot = resolve_model("org/model")
        assert any(path.is_symlink() for path in snapshot.iterdir())
        assert record.base_id == f"org/model@{COMMIT}"
        assert not verify(tmp_path / "out", resolve_model(record.base_id)).problems
    # The cache's folder, of links into it, named directly.
    assert expand(str(snapshot), tmp_path / "again", new_blocks=2) == record
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert torch.equal(logits(tmp_path / "out", cached=False), logits(repository, cached=False))


def test_without_the_network_the_cache_is_enough(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(Hub(repository), tmp_path):
        folder = resolve_model("org/model")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model") == folder
    with pytest.raises(UserError, match=r"org/model-1 is no local folder, .* offline mode is enabled.*, nor does the"):
        resolve_model("org/model-1")


def test_what_the_hub_does_not_give_is_one_message(repository: Path, tmp_path: Path) -> None:
    with served(Hub(repository, gated=True), tmp_path):
        with pytest.raises(UserError, match="org/model is gated: accept its terms"):
            resolve_model("org/model")
        with pytest.raises(UserError, match="org/model has no revision v2"):
            resolve_model("org/model@v2")
        with pytest.raises(UserError, match="org/other is neither a local folder nor a model on the hub"):
            resolve_model("org/other")


def test_a_broken_way_to_the_hub_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise HTTPError("the proxy answered 407")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="org/model is no local folder, .*: the proxy answered 407"):
        resolve_model("org/model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny.Q4_K_M.gguf", r"holds GGUF only; download .* org/model tiny\.Q4_K_M\.gguf"),
        ("pytorch_model-00001-of-00002.bin", "pass --allow-pickle"),
        ("model.onnx", "holds neither"),
    ],
)
def test_a_repository_without_safetensors_says_what_it_holds(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "model").mkdir()
    for one in ("config.json", name):
        (tmp_path / "model" / one).write_text("{}")
    hub = Hub(tmp_path / "model")
    with served(hub, tmp_path / "cache"), pytest.raises(ModelRefused, match=words):
        resolve_model("org/model")
    assert hub.fetched == {"config.json"}


def test_pickles_are_fetched_on_request_only(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(all_tensors(save_tiny_llama(tmp_path / "same")), tmp_path / "model" / "pytorch_model.bin")
    with served(Hub(tmp_path / "model"), tmp_path / "cache"):
        with pytest.raises(ModelRefused, match="org/model holds its weights as pickles"):
            expand("org/model", tmp_path / "out", new_blocks=1)
        expand("org/model", tmp_path / "out", new_blocks=1, allow_pickle=True)
    assert torch.equal(logits(tmp_path / "out", cached=False), logits(repository, cached=False))


def test_an_index_that_names_strange_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    index = {"weight_map": {"x": "../*.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with served(Hub(tmp_path / "model"), tmp_path / "cache"), pytest.raises(Corrupted, match="no file name"):
        resolve_model("org/model")


def test_the_repository_of_a_hub_id() -> None:
    assert hub_repository("org/name") == hub_repository(f"org/name@{COMMIT}") == "org/name"
    assert hub_repository("my-base") is hub_repository("name.gguf") is hub_repository("org/name@") is None


def test_a_local_path_never_becomes_the_base_id(tmp_path: Path) -> None:
    (tmp_path / "my-base").mkdir()
    assert base_name_of(str(tmp_path / "my-base"), None) == "my-base"
    assert base_name_of("org/name", None) == "org/name"
    assert base_name_of(str(tmp_path / "my-base"), "org/given") == "org/given"
    for wrong in (str(tmp_path), "~/x", ""):
        with pytest.raises(UserError, match="--base-id"):
            base_name_of("org/name", wrong)


def test_companions_are_found_and_executables_never(tmp_path: Path) -> None:
    wanted = {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json"),
        *("merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE.txt"),
        *("additional_chat_templates/tool.jinja", "tokenizer.model.v3", "tekken.json", "license.txt", "LICENCE"),
        *("BASE_MODEL_CARD.md", "USE_POLICY.md"),
    }
    other = {"tokenizer.py", "tokenizer.bin", "LICENSE.pt", "README.md", "model.safetensors", "config.json", "x.py"}
    for name in wanted | other:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert {str(path) for path in companion_files(tmp_path)} == wanted


def damaged(folder: Path, fault: str) -> None:
    """Damage a sharded folder in one way."""
    shards = sorted(folder.glob("model-*.safetensors"))
    if fault == "missing":
        shards[1].unlink()
    elif fault == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
    elif fault == "longer":
        shards[1].write_bytes(shards[1].read_bytes() + b"x")
    elif fault == "header":
        shards[1].write_bytes((1 << 40).to_bytes(8, "little") + shards[1].read_bytes()[8:])
    elif fault == "swapped":
        shards[0].rename(folder / "x")
        shards[1].rename(shards[0])
        (folder / "x").rename(shards[1])
    elif fault == "doubled":
        shutil.copy(shards[0], shards[1])


@pytest.mark.parametrize("fault", ["missing", "truncated", "longer", "header", "swapped", "doubled"])
def test_shards_that_are_not_what_they_should_be_are_named(repository: Path, tmp_path: Path, fault: str) -> None:
    shutil.copytree(repository, tmp_path / "model")
    damaged(tmp_path / "model", fault)
    with pytest.raises(Corrupted, match=r"model-00002-of|model\.safetensors\.index\.json"):
        expand(str(tmp_path / "model"), tmp_path / "out", new_blocks=1)
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_shards_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", max_shard_size="60KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    first = base / "model-00001-of-00005.safetensors"
    assert index[name] > first.name
    with safe_open(first, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors | {name: torch.full((32,), 2.0)}, first, {"format": "pt"})
    expand(str(base), tmp_path / "out", new_blocks=1)
    assert torch.equal(logits(tmp_path / "out", cached=False), logits(base, cached=False))


def test_every_floating_dtype_is_kept_tensor_by_tensor(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = all_tensors(base)
    mixed = {name: tensor.to(dtypes[number % 4]) for number, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    record = expand(str(base), tmp_path / "out", new_blocks=2)
    written = all_tensors(tmp_path / "out")
    for name, digest in record.base_tensors.items():
        source = mixed[digest.base_name]
        assert written[name].dtype == source.dtype
        assert torch.equal(written[name], source)
        assert digest.sha256 == digest.source_sha256
    assert {written[name].dtype for name in record.zeroed} <= set(dtypes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_tensors_of_quantized_kinds_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_tiny_llama(tmp_path / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = all_tensors(base)
    save_file(tensors | {name: tensors[name].to(dtype)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelRefused, match=rf"tensor {name} is \w+: start from the unquantized model"):
        expand(str(base), tmp_path / "out", new_blocks=1)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_model_keeps_what_its_file_holds(tmp_path: Path, stored: str) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=True)
    tensors = all_tensors(base)
    embedding = tensors.pop("model.embed_tokens.weight")
    kept = {"embedding": ["model.embed_tokens.weight"], "head": ["lm_head.weight"]}
    names = kept.get(stored) or [*kept["embedding"], *kept["head"]]
    outside = {name: embedding.clone() for name in names}
    save_file(tensors | outside, base / "model.safetensors", {"format": "pt"})
    expand(str(base), tmp_path / "out", new_blocks=1)
    written = all_tensors(tmp_path / "out")
    assert {name for name in written if not name.startswith(("model.layers.", "model.norm."))} == set(outside)
    assert torch.equal(logits(tmp_path / "out", cached=False), logits(base, cached=False))
