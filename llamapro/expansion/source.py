"""Where a model comes from: a local folder or a hub id, its config checked, nothing in it ever executed."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from llamapro.errors import Corrupted, ModelRefused, UserError
from llamapro.expansion.families import supported_model_types
from llamapro.expansion.record import CONFIG_NAME
from llamapro.files.tensors import INDEX_FILE, SINGLE_FILE

HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?", flags=re.ASCII
)
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
# A model's card; what is made from the model keeps it under the other name, because it states the base's licence.
CARD_NAME = "README.md"
BASE_CARD_NAME = "BASE_MODEL_CARD.md"
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
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "USE_POLICY*",
    BASE_CARD_NAME,
)
# Their names begin so, in any case, when they state terms.
TERMS = ("license", "licence", "notice", "use_policy")
NEVER_FETCHED = (".py", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
NEVER_COPIED = (*NEVER_FETCHED, ".bin", ".safetensors", ".gguf")
ONLY_PICKLES = (
    "holds its weights as pickles (.bin), which can run code when loaded; take a safetensors version of the model, or "
    "pass --allow-pickle to `llamapro expand`, which converts them with torch's weights-only loader"
)
# Fields that transformers writes about where a model was loaded from; they choose nothing.
HARMLESS_PRIVATE_FIELDS = {"_name_or_path", "_commit_hash"}
# Looked up in a table of transformers' own, unlike the other fields with this ending.
HARMLESS_IMPLEMENTATION_FIELDS = {"cache_implementation"}
CODE_FIELDS = {"auto_map", "custom_pipelines", "trust_remote_code"}


def resolve_model(path_or_hub_id: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a model: a local one as given, or a snapshot of a hub repository (fetched if it must be).

    Args:
        path_or_hub_id: of a repository also with a revision: org/name@branch, @tag or @commit.
        allow_pickle: fetch `.bin` weights where there are no safetensors.

    Raises:
        UserError: it is neither a folder nor the id of a repository that can be fetched.
    """
    folder = Path(path_or_hub_id).expanduser()
    if path_or_hub_id and folder.is_dir():
        return folder
    if folder.suffix == ".gguf":
        raise ModelRefused(f"{path_or_hub_id} is a GGUF file, which only `llamapro expand` takes; give a model folder")
    match = HUB_ID.fullmatch(path_or_hub_id)
    if match is None or folder.exists():
        raise UserError(f"{path_or_hub_id} is neither a folder nor a hub id such as org/name or org/name@revision")
    return _fetch(match["repository"], match["revision"], allow_pickle)


def hub_repository(name: str) -> str | None:
    """The repository of a hub id, without its revision; None for any other name."""
    match = HUB_ID.fullmatch(name)
    return match["repository"] if match else None


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Many repositories name code of their own (`auto_map`) for a type that transformers has long known itself. For the
    types that can be expanded this is left out: transformers' own class is used, as it is for everyone who doesn't
    trust remote code.

    Raises:
        ModelRefused: there is none, or it selects code to run or a quantization.
        Corrupted: it can't be read.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    if config is None:
        gguf = " (it holds GGUF, which only `llamapro expand` takes)" if any(folder.glob("*.gguf")) else ""
        raise ModelRefused(f"{folder} has no {CONFIG_NAME}, so it is not a Hugging Face model folder{gguf}")
    refuse_code(folder)
    config.pop("auto_map", None)
    for field, method in _fields(config):
        if field == "quantization_config" and method:
            name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
            raise ModelRefused(f"{path}: the weights are quantized ({name}); start from the unquantized model")
    if weights := config.get("transformers_weights"):
        raise ModelRefused(f"{path}: transformers_weights chooses other weights than the usual ones: {weights!r}")
    return config


def refuse_code(folder: Path) -> None:
    """Refuse a model one of whose settings selects code to run.

    Raises:
        ModelRefused: names the file, the field and its value.
    """
    for name in (CONFIG_NAME, "tokenizer_config.json", "generation_config.json"):
        config = read_json(folder / name) or {}
        if config.get("model_type") in supported_model_types():
            config.pop("auto_map", None)
        for field, value in _fields(config):
            _refuse_code_field(folder / name, field, value)


def own_code(folder: Path) -> str | None:
    """What a model's config.json names as its own code, in words; None if nothing. It is never run."""
    named = (read_json(folder / CONFIG_NAME) or {}).get("auto_map")
    return ", ".join(map(str, named.values())) if isinstance(named, dict) and named else None


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds a model's weights as safetensors."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def refuse_other_weights(folder: Path) -> None:
    """Refuse a folder without safetensors, saying what it holds instead and the way out."""
    if has_safetensors(folder):
        return
    if any(folder.glob("*.bin")):
        raise ModelRefused(f"{folder} {ONLY_PICKLES}")
    if any(folder.glob("*.gguf")):
        raise ModelRefused(f"{folder} holds its weights as GGUF, which only `llamapro expand` takes")
    raise ModelRefused(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and licence files of a model, relative to its folder."""
    found = {path for pattern in COMPANION_PATTERNS for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder) for path in found if path.is_file() and path.suffix not in NEVER_COPIED)


def base_name_of(given: str, base_id: str | None, folder: Path | None = None) -> str:
    """What a record calls a base: `base_id`, else hub id and commit, else the name of the local folder or file.

    Args:
        folder: where the base was found, if that may be a snapshot in the hub's cache.

    Raises:
        UserError: `base_id` is an absolute path.
    """
    if base_id is not None:
        if not base_id or Path(base_id).is_absolute() or base_id.startswith("~"):
            raise UserError(f"--base-id {base_id!r}: give a hub id or a name; a local path means nothing elsewhere")
        return base_id
    place = (folder or Path(given).expanduser()).resolve()
    snapshots, cached = place.parent, place.parent.parent.name
    if snapshots.name == "snapshots" and cached.startswith("models--"):
        return f"{cached.removeprefix('models--').replace('--', '/', 1)}@{place.name}"
    return place.name if place.exists() else given


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


def _refuse_code_field(path: Path, field: str, value: Any) -> None:
    if field in CODE_FIELDS and value:
        raise ModelRefused(f"{path}: {field} points to code of the model's own, which is never run: {value!r}")
    # A string in such a field can name a hub repository whose code transformers would fetch and run.
    chooses = field.endswith("_implementation") or (
        field.startswith("_") and not isinstance(value, bool | int | float | None)
    )
    harmless = HARMLESS_PRIVATE_FIELDS | HARMLESS_IMPLEMENTATION_FIELDS
    if chooses and field not in harmless and value is not None:
        raise ModelRefused(f"{path}: {field}: {value!r} selects an implementation; remove the field")


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for field, value in config.items():
        yield field, value
        if isinstance(value, dict):
            yield from _fields(value)


def _fetch(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    """A snapshot with settings, tokenizer and one set of weights: safetensors, or else pickles if they are allowed."""
    folder = _download(
        repository, revision, [CONFIG_NAME, CARD_NAME, INDEX_FILE, PICKLE_INDEX_FILE, *COMPANION_PATTERNS]
    )
    commit = folder.name
    _download(repository, commit, _weight_files(folder, INDEX_FILE, SINGLE_FILE))
    if allow_pickle and not has_safetensors(folder):
        _download(repository, commit, _weight_files(folder, PICKLE_INDEX_FILE, PICKLE_FILE))
    elif not has_safetensors(folder):
        _refuse_repository(repository, commit)
    return folder


def _weight_files(folder: Path, index_file: str, single_file: str) -> list[str]:
    """The files with the weights: those that the index names, if there is one, else the single one."""
    index = read_json(folder / index_file)
    weight_map = None if index is None else index.get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else {single_file}
    if odd := [name for name in names if not isinstance(name, str) or re.search(r"[*?\[/]", name)]:
        raise Corrupted(f"{folder / index_file} names {odd[0]!r}, which is no file name")
    return sorted(names)


def _refuse_repository(repository: str, commit: str) -> None:
    from huggingface_hub import HfApi

    with _hub_errors(repository, commit):
        names = HfApi().list_repo_files(repository, revision=commit)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise ModelRefused(
            f"{repository} holds GGUF only; download the file that you want (hf download {repository} {gguf[0]}) and "
            "give its path"
        )
    if any(name.endswith(".bin") for name in names):
        raise ModelRefused(f"{repository} {ONLY_PICKLES}")
    raise ModelRefused(f"{repository} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    executable = [f"*{ending}" for ending in NEVER_FETCHED]
    with _hub_errors(repository, revision):
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=executable)
        )


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Every failure of the hub or of the way to it as one message."""
    from huggingface_hub import constants, errors

    unknown = f"{repository} is no local folder, and it can't be fetched from the hub"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms on its page of the hub, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repository} is neither a local folder nor a model on the hub (or it is private: log in with "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repository} has no revision {revision}; give one of its branches, tags or commits"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        cache = constants.HF_HUB_CACHE
        raise UserError(f"{unknown} ({_reason(error)}), nor does the cache {cache} hold all of it") from error
    # HTTPError is that of whichever HTTP library the hub's client uses.
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        raise UserError(f"{unknown}: {error}") from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the very beginning of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
