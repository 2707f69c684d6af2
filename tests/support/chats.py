"""Conversations and the tokenizers that chat templates are made for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_tools.build import build_dataset
from data_tools.chat.options import ChatRequest
from data_tools.request import BuildRequest
from llamapro.data.dataset import Dataset
from tests.support.data import random_texts
from tests.support.tokenizers import save_kind

SPECIAL = {
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "zephyr": ("<s>", "</s>"),
    "plain": ("<s>", "</s>"),
}
TWO_ROUNDS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a lung?"},
    {"role": "assistant", "content": "An organ. 🙂"},
    {"role": "user", "content": "And été?\nIn 日本?"},
    {"role": "assistant", "content": "A season:\n\nsummer."},
]


def save_byte_level(folder: Path, name: str) -> Path:
    """A byte-level tokenizer with the control tokens of a packaged template; BOS is the first, EOS the second."""
    special = SPECIAL[name]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(random_texts(200, seed=3), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[1]).save_pretrained(folder)
    return folder


def save_llama_2(folder: Path) -> Path:
    """A tokenizer.json of the first Llama 2's kind; `folder/model` has the sentencepiece model that it was made of."""
    save_kind("llama-2", folder)
    return folder


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def build_chats(inputs: Sequence[Path], model: Path, output: Path, chat: ChatRequest, **changes: Any) -> Dataset:
    """Run the real builder on conversations."""
    values: dict[str, Any] = {
        "inputs": tuple(map(str, inputs)),
        "tokenizer": str(model),
        "output": output,
        "text_field": "text",
        "split": "file",
        "heldout": 0.0,
        "license": "",
        "max_reject_fraction": 0.01,
        "workers": 1,
        "chat": chat,
    }
    build_dataset(BuildRequest(**(values | changes)))
    return Dataset.open(output)


def learned_ids(dataset: Dataset, split: Any = "train") -> dict[int, tuple[list[int], list[int]]]:
    """By input row: a document's ids, and those of them that are learned."""
    found = {}
    for shard in dataset.split(split).shards:
        for index, row in enumerate(shard.column("source_rows").tolist()):
            ids = shard.document(index).tolist()
            spans = shard.loss_spans(index)
            learned = ids if spans is None else [token for start, stop in spans for token in ids[start:stop]]
            found[row] = (ids, learned)
    return found
