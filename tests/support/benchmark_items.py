"""A small archive of benchmark items in the layout of the real one; its items are this project's own."""

import gzip
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from llamapro.evaluation.benchmarks.archive import DATASETS, REQUESTS

SKIES = ("red", "blue", "green", "black")
ARC = [
    {
        "id": f"Q{number}",
        "question": f"Which colour has sky number {number}?",
        "choices": {"text": [f"{sky} {number}" for sky in SKIES], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }
    for number in range(12)
]
HELLASWAG = [
    {
        "ind": number,
        "activity_label": "Baking [title] bread",
        "ctx_a": f"A woman kneads {number} doughs.",
        "ctx_b": "she",
        "endings": ["sings  loudly.", f"bakes {number} of them.", "[step] throws them away.", "sleeps."],
        "label": str(number % 4),
    }
    for number in range(10)
]
PIQA = [
    {"goal": f"Open {number} jars", "sol1": "turn the lid", "sol2": f"kick it {number} times", "label": number % 2}
    for number in range(10)
]
MBPP = [
    {
        "task_id": 100 + number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n    return x + {number} # ä",
        "test_list": [f"assert add({x}) == {x + number}" for x in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in range(8)
]
HUMANEVAL = [
    {
        "task_id": f"Own/{number}",
        "prompt": f'def times(x):\n    """The product of x and {number}."""\n',
        "canonical_solution": f"    return x * {number}\n",
        "test": f"def check(candidate):\n    assert candidate(3) == {3 * number}\n",
        "entry_point": "times",
    }
    for number in range(4)
]
GSM8K = [
    {"question": f"Ann has {number} pens and buys 2. How many has she?", "answer": f"{number}+2.\n#### {number + 2}"}
    for number in range(9)
]
MMLU = [
    {"question": f"What is {number} + 1?", "subject": "sums", "choices": ["0", str(number + 1), "7", "9"], "answer": 1}
    for number in range(12)
]


def write_archive(path: Path) -> Path:
    """Write the archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for place, split, rows in (
            ("ai2_arc/ARC-Easy", "validation", ARC[:4]),
            ("hellaswag/none", "validation", HELLASWAG),
            ("piqa/plain_text", "validation", PIQA),
            ("hails/mmlu_no_train/sums", "dev", MMLU[:5]),
            ("hails/mmlu_no_train/sums", "test", MMLU[5:]),
            ("hails/mmlu_no_train/anatomy", "dev", MMLU[:5]),
            ("hails/mmlu_no_train/anatomy", "test", MMLU[5:]),
        ):
            archive.writestr(f"{DATASETS}/{place}/{split}/data-00000-of-00001.arrow", arrow_stream(rows))
        for place, documents in (
            ("arc_easy/test_rc_5shot", [as_request_document(item) for item in ARC[4:]]),
            ("codex_mbpp/gold_bpb_0shot", MBPP),
            ("codex_humaneval/gold_bpb_0shot", HUMANEVAL),
            ("gsm8k/gold_bpb_5shot", GSM8K),
        ):
            archive.writestr(f"{REQUESTS}/{place}/requests.jsonl.gz", requests(documents))
    return path


def arrow_stream(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as an Arrow stream."""
    table, stream = pa.Table.from_pylist(list(rows)), io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def as_request_document(item: Mapping[str, Any]) -> dict[str, Any]:
    """An ARC question as the request files have it."""
    return {
        "id": item["id"],
        "query": f"Question: {item['question']}\nAnswer:",
        "choices": item["choices"]["text"],
        "gold": item["choices"]["label"].index(item["answerKey"]),
    }


def requests(documents: Sequence[Mapping[str, Any]]) -> bytes:
    """Two requests for each document, and an unconditional one."""
    lines = [
        orjson.dumps({"doc": document, "doc_id": number + offset, "request": {"context": "", "continuation": "x"}})
        for number, document in enumerate(documents)
        for offset in (0, 0, 1_000_000)
    ]
    return gzip.compress(b"\n".join(lines))
