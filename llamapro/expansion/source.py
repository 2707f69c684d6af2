"""Where a model comes from: a local folder or a hub id, its config checked, nothing in it ever executed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from llamapro.errors import Corrupted, ModelRefused, UserError
from llamapro.expansion.record import CONFIG_NAME
from llamapro.files.tensors import INDEX_FILE, SINGLE_FILE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", flags=re.ASCII)
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
# What a model consists of besides its config and weights.
COMPANION_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".safetensors", ".gguf")
# Fields that transformers writes about where a model was loaded from; they choose nothing.
HARMLESS_PRIVATE_FIELDS = {"_name_or_path", "_commit_hash"}


def resolve_model(path_or_hub_id: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a model: a local one as given, or a snapshot of a hub repository (fetched if it must be).

    Raises:
        UserError: it is neither a folder nor the id of a repository that can be fetched.
    """
    folder = Path(path_or_hub_id).expanduser()
    if path_or_hub_id and folder.is_dir():
        return folder
    if folder.suffix == ".gguf":
        raise ModelRefused(f"{path_or_hub_id} is a GGUF file; convert it to safetensors first")
    if not HUB_ID.fullmatch(path_or_hub_id) or folder.exists():
        raise UserError(f"{path_or_hub_id} is neither a folder nor a hub id such as org/name")
    return _fetch(path_or_hub_id, allow_pickle)


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ModelRefused: there is none, or it selects code to run or a quantization.
        Corrupted: it can't be read.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    if config is None:
        gguf = " (it holds GGUF: convert it to safetensors first)" if any(folder.glob("*.gguf")) else ""
        raise ModelRefused(f"{folder} has no {CONFIG_NAME}, so it is not a Hugging Face model folder{gguf}")
    _refuse_code(path, config)
    _refuse_code(folder / "tokenizer_config.json", read_json(folder / "tokenizer_config.json") or {})
    if method := config.get("quantization_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise ModelRefused(f"{path}: the weights are quantized ({name}); start from the unquantized model")
    return config


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds a model's weights as safetensors."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def refuse_other_weights(folder: Path) -> None:
    """Refuse a folder without safetensors, saying what it holds instead and the way out."""
    if has_safetensors(folder):
        return
    if any(folder.glob("*.bin")):
        raise ModelRefused(
            f"{folder} holds its weights as pickles (.bin), which can run code when loaded; take a safetensors version "
            "of the model, or pass --allow-pickle to convert them with torch's weights-only loader"
        )
    if any(folder.glob("*.gguf")):
        raise ModelRefused(f"{folder} holds its weights as GGUF; convert them to safetensors first")
    raise ModelRefused(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and licence files of a model, relative to its folder."""
    found = {path for pattern in COMPANION_PATTERNS for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder) for path in found if path.is_file() and path.suffix not in NEVER_COPIED)


def base_name_of(given: str, base_id: str | None) -> str:
    """What a record calls a base: `base_id`, else a hub id as given, else the name of the local folder.

    Raises:
        UserError: `base_id` is an absolute path.
    """
    if base_id is not None:
        if not base_id or Path(base_id).is_absolute() or base_id.startswith("~"):
            raise UserError(f"--base-id {base_id!r}: give a hub id or a name; a local path means nothing elsewhere")
        return base_id
    folder = Path(given).expanduser()
    return folder.resolve().name if folder.is_dir() else given


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None when the file is absent."""
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Corrupted(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise Corrupted(f"{path} holds no JSON object")
    return content


def _refuse_code(path: Path, config: dict[str, Any]) -> None:
    for field, value in _fields(config):
        if field in {"auto_map", "custom_pipelines"} and value:
            raise ModelRefused(f"{path}: {field} points to code of the model's own, which is never run: {value!r}")
        # A string in such a field can name a hub repository whose code transformers would fetch and run.
        chooses = field.endswith("_implementation") or (field.startswith("_") and not isinstance(value, bool | None))
        if chooses and field not in HARMLESS_PRIVATE_FIELDS and value is not None:
            raise ModelRefused(f"{path}: {field}: {value!r} selects an implementation; remove the field")


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for field, value in config.items():
        yield field, value
        if isinstance(value, dict):
            yield from _fields(value)


def _fetch(hub_id: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = ["*.safetensors", INDEX_FILE] + (["pytorch_model*.bin", PICKLE_INDEX_FILE] if allow_pickle else [])
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG_NAME, *COMPANION_PATTERNS, *weights]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(f"{hub_id} is no local folder, and it can't be fetched from the hub: {error}") from error
