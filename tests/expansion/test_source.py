"""Where a model comes from: code, quantization and foreign weights refused; companions copied, executables never."""

import json
from pathlib import Path

import pytest

from llamapro.errors import Corrupted, ModelRefused, UserError
from llamapro.expansion.source import base_name_of, companion_files, read_config, refuse_other_weights, resolve_model


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
    ],
)
def test_configs_that_select_code_or_quantization_are_refused(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelRefused, match=words):
        read_config(folder_with(tmp_path, config))


def test_code_in_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="tokenizer_config.json: auto_map"):
        read_config(folder_with(tmp_path, {}, {"auto_map": {"AutoTokenizer": ["own.T", None]}}))


def test_harmless_private_fields_are_accepted(tmp_path: Path) -> None:
    config = {"_name_or_path": "/x", "_commit_hash": "1", "_attn_implementation_autoset": True, "auto_map": {}}
    assert read_config(folder_with(tmp_path, config, {"chat_template": "x"})) == config


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="not a Hugging Face model folder$"):
        read_config(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelRefused, match="convert it to safetensors first"):
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
    with pytest.raises(ModelRefused, match="convert it to safetensors first"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="org/model-1 is no local folder, and it can't be fetched"):
        resolve_model("org/model-1")


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
        "additional_chat_templates/tool.jinja",
    }
    other = {"tokenizer.py", "tokenizer.bin", "LICENSE.pt", "README.md", "model.safetensors", "config.json", "x.py"}
    for name in wanted | other:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert {str(path) for path in companion_files(tmp_path)} == wanted
