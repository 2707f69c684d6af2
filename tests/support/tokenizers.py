"""Small tokenizers of the kinds that models have, each with the normalizer and pre-tokenizer of its family."""

from pathlib import Path

import orjson
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.data import random_texts, save_sentencepiece, save_tokenizer

WORDS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_OF_QWEN = WORDS_OF_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS_OF_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
BYTE_LEVEL = ("byte-level", "llama-3", "qwen", "deepseek")
SENTENCEPIECE = ("llama-2", "metaspace", "metaspace without a mark before")
KINDS = BYTE_LEVEL + SENTENCEPIECE


def save_kind(kind: str, folder: Path) -> Path:
    """The tokenizer.json of one of `KINDS`."""
    if kind == "byte-level":
        save_tokenizer(folder)
    elif kind in BYTE_LEVEL:
        _trained(kind).save(str(folder / "tokenizer.json"))
    else:
        _converted(kind, folder)
    return folder / "tokenizer.json"


def _trained(kind: str) -> Tokenizer:
    """Splits by the family's expressions; qwen normalizes, llama-3 takes whole words of its vocabulary as they are."""
    splits = {"llama-3": [WORDS_OF_LLAMA_3], "qwen": [WORDS_OF_QWEN], "deepseek": SPLITS_OF_DEEPSEEK}[kind]
    core = Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
    if kind == "qwen":
        core.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*random_texts(400, seed=7), "it's I'M don't we'll 1234567 12 3 x1 e\u0301 日本語中文"]
    core.train_from_iterator(texts, trainer)
    return core


def _converted(kind: str, folder: Path) -> None:
    """A sentencepiece model as transformers saves it now, without a mark before texts, or as of the first Llama 2."""
    save_sentencepiece(folder / "model")
    transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder)
    path = folder / "tokenizer.json"
    stated = orjson.loads(path.read_bytes())
    assert stated["pre_tokenizer"]["type"] == "Metaspace" and not stated["pre_tokenizer"]["split"]
    if kind == "llama-2":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        stated["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
        stated["pre_tokenizer"] = None
    elif kind != "metaspace":
        stated["pre_tokenizer"]["prepend_scheme"] = "never"
    path.write_bytes(orjson.dumps(stated))
