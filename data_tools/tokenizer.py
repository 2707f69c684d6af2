"""A model's tokenizer as its folder states it, read without transformers: ids of BOS, EOS and padding, added tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from data_tools.encoders import sentencepiece_processor, tokenizers_tokenizer
from data_tools.plan import TokenizerFacts
from llamapro.data.shard import token_dtype
from llamapro.data.tokenizer_identity import tokenizer_identity
from llamapro.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
CONFIG_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")


@dataclass(frozen=True)
class _Vocabulary:
    """What the tokenizer's file says.

    Attributes:
        added: id by text of special and other added tokens; ids: of all tokens.
        first_added: the id that the model's tokenizer puts before every text, if it does.
    """

    added: dict[str, int]
    ids: dict[str, int]
    identity: str
    first_added: int | None


def locate_tokenizer(model: str) -> Path:
    """The local folder with the tokenizer of a model folder or hub id.

    Raises:
        DataError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.name in (TOKENIZER_JSON, TOKENIZER_MODEL):
        return path.parent.resolve()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise DataError(f"--tokenizer {model}: there is no such folder, and it is no hub id (OWNER/NAME)")
    return _download(model)


def read_tokenizer(folder: Path) -> TokenizerFacts:
    """What a dataset states about the tokenizer in a folder.

    Raises:
        DataError: there is no tokenizer, it can't be read, or it has no end-of-document token.
    """
    path = tokenizer_file(folder)
    settings = _settings(folder)
    vocabulary = _json_vocabulary(path) if path.name == TOKENIZER_JSON else _sentencepiece_vocabulary(path, folder)
    eos = _special_id("eos_token", settings, vocabulary)
    if eos is None:
        raise DataError(f"{folder}: no eos_token is stated in {', '.join(CONFIG_FILES)}, so nothing ends a document; "
                        "add \"eos_token\" to tokenizer_config.json")  # fmt: skip
    bos = _special_id("bos_token", settings, vocabulary)
    pad = _special_id("pad_token", settings, vocabulary)
    size = max(vocabulary.ids.values()) + 1
    return TokenizerFacts(
        tokenizer_identity=vocabulary.identity,
        vocab_size=size,
        bos_id=bos,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        bos_inserted=bos is not None and vocabulary.first_added == bos,
        eos_inserted=True,
        token_dtype=token_dtype(size),
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def tokenizer_file(folder: Path) -> Path:
    """The file that the tokenizer is read from: tokenizer.json, else tokenizer.model."""
    for name in (TOKENIZER_JSON, TOKENIZER_MODEL):
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder} has neither {TOKENIZER_JSON} nor {TOKENIZER_MODEL}; pass the model's folder as --tokenizer"
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer, as a dataset keeps them: they decode what it holds."""
    names = (tokenizer_file(folder).name, *CONFIG_FILES[:-1])
    return [folder / name for name in names if (folder / name).is_file()]


def special_texts(folder: Path) -> list[str]:
    """The texts of the added tokens, which as part of a document are only text."""
    path = tokenizer_file(folder)
    return sorted(
        (_json_vocabulary(path) if path.name == TOKENIZER_JSON else _sentencepiece_vocabulary(path, folder)).added
    )


def token_ids(folder: Path) -> dict[str, int]:
    """The ids of all tokens by their texts."""
    path = tokenizer_file(folder)
    return (_json_vocabulary(path) if path.name == TOKENIZER_JSON else _sentencepiece_vocabulary(path, folder)).ids


def named_tokens(folder: Path) -> dict[str, str]:
    """The texts of tokens by the names that a model's settings have for them: `bos_token`, `pad_token` and the like."""
    stated = {name: item for name, item in _settings(folder).items() if name.endswith("_token")}
    texts = {name: item.get("content") if isinstance(item, dict) else item for name, item in stated.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def special_tokens(folder: Path) -> list[str]:
    """The texts of the tokens of a tokenizer.json that are marked as special: control tokens, never part of a text."""
    added = tokenizers_tokenizer(folder / TOKENIZER_JSON).get_added_tokens_decoder().values()
    return sorted(token.content for token in added if token.special)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [TOKENIZER_JSON, TOKENIZER_MODEL, *CONFIG_FILES, "chat_template.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted)).resolve()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"--tokenizer {model}: there is no such folder, and it can't be fetched from the hub: "
                        f"{error}") from error  # fmt: skip


def _settings(folder: Path) -> dict[str, Any]:
    """The small files beside the tokenizer as one mapping; those named first in CONFIG_FILES win."""
    merged: dict[str, Any] = {}
    for name in reversed(CONFIG_FILES):
        path = folder / name
        if not path.is_file() or name == "added_tokens.json":
            continue
        merged.update({key: item for key, item in _json_object(path).items() if item is not None})
    return merged


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold one JSON object; restore the model's own file")
    return value


def _special_id(name: str, settings: dict[str, Any], vocabulary: _Vocabulary) -> int | None:
    """The id of eos_token, bos_token or pad_token: by its text, else by the id in config.json."""
    stated = settings.get(name)
    text = stated.get("content") if isinstance(stated, dict) else stated
    if text is not None:
        if text not in vocabulary.ids:
            raise DataError(f"the tokenizer has no token {text!r}, which its settings call {name}")
        return vocabulary.ids[text]
    number = settings.get(f"{name}_id")
    first = number[0] if isinstance(number, list) and number else number
    return first if isinstance(first, int) and 0 <= first <= max(vocabulary.ids.values()) else None


def _json_vocabulary(path: Path) -> _Vocabulary:
    tokenizer = tokenizers_tokenizer(path)
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    first_added = whole[0] if whole[:1] != plain[:1] else None
    identity = tokenizer_identity(added, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids))
    return _Vocabulary(added, tokenizer.get_vocab(with_added_tokens=True), identity, first_added)


def _sentencepiece_vocabulary(path: Path, folder: Path) -> _Vocabulary:
    processor = sentencepiece_processor(path)
    ids = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    added = {text: i for text, i in ids.items() if processor.is_control(i) or processor.is_unknown(i)}
    extra = folder / "added_tokens.json"
    if extra.is_file():
        added |= _json_object(extra)
    identity = tokenizer_identity(added, lambda text: list(processor.encode(text)))
    # As in transformers 5: without a tokenizer.json, BOS is added exactly where the settings ask for it.
    first_added = processor.bos_id() if _settings(folder).get("add_bos_token") is True else None
    return _Vocabulary(added, ids | added, identity, first_added)
