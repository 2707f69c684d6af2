"""Documents that share 13 words in a row with an evaluation item are found, and no others."""

import re

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.build import build_dataset
from data_tools.decontaminate import EvaluationIndex, words_of
from data_tools.inputs import find_inputs
from data_tools.request import BuildRequest
from llamapro.data.dataset import Dataset
from llamapro.data.verify import verify_dataset
from llamapro.errors import DataError
from tests.support.data import build, save_tokenizer, shard_bytes, write_jsonl

QUESTION = "Which of the four chambers of the human heart receives the blood that returns from the lungs first?"
SHORT = "The mitral valve has exactly two leaflets here."
ITEMS = [
    {"id": 1, "question": QUESTION, "choices": {"text": ["the left atrium", "the aorta"]}, "answer": ["A", None, 3.5]},
    {"id": 2, "question": "Too short to be found?"},
    {"id": 3, "question": SHORT},
]


def index_of(tmp_path, items=ITEMS, name="eval.jsonl"):
    (tmp_path / name).write_bytes(b"".join(orjson.dumps(item) + b"\n" for item in items))
    return EvaluationIndex(find_inputs([str(tmp_path / name)], None, "--decontaminate"))


def naive_grams(text, size):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_thirteen_words_are_a_match_and_twelve_are_none_whatever_stands_between(tmp_path):
    index = index_of(tmp_path)
    words = QUESTION.split()
    assert [match.row for match in index.matches("x " + " ".join(words[2:15]) + " y")] == [0]
    assert index.matches(" ".join([*words[2:14], "otherwise", *words[15:]])) == []
    (match,) = index.matches("FOO\n" + " -- ".join(words).upper() + "…\tbar")
    assert match.gram == " ".join(words[:13]).lower() and match.grams == len(words) - 12
    assert (index.items, index.too_short) == (3, 1)


def test_an_item_of_eight_words_is_looked_for_as_a_whole(tmp_path):
    index = index_of(tmp_path)
    assert [(m.row, m.gram) for m in index.matches("so: THE mitral-valve has exactly two leaflets, here")] == [
        (2, "the mitral valve has exactly two leaflets here")
    ]
    assert index.matches("the mitral valve has exactly two leaflets there") == []


def test_words_do_not_run_from_one_text_of_an_item_into_the_next(tmp_path):
    halves = [" ".join(f"{side}{n}" for n in range(9)) for side in ("a", "b")]
    index = index_of(
        tmp_path, [{"x": f"{halves[0]} more words to be longer than thirteen", "y": halves[1]}, {"z": halves[1]}]
    )
    tail = "more words to be longer than thirteen"
    assert index.matches(f"a5 a6 a7 a8 {tail} b0 b1 b2 b3 b4 b5 b6 b7 otherwise") == []
    (match,) = index.matches(f"a3 a4 a5 a6 a7 a8 {tail} and {halves[1]}")
    assert (match.row, match.grams) == (0, 2)
    assert [match.row for match in index.matches(halves[1])] == [0]


def test_scripts_without_spaces_are_compared_by_characters(tmp_path):
    text = "人体心脏的左心房接收从肺部返回的血液"
    index = index_of(tmp_path, [{"q": text}])
    assert index.matches(f"前言{text[2:15]}后记") and not index.matches(f"前言{text[2:14]}后记")
    assert words_of("Äpfel_und２ 日本go") == ["äpfel", "und2", "日", "本", "go"]


def test_random_texts_agree_with_sets_of_grams(tmp_path):
    generator = np.random.default_rng(1)
    vocabulary = [f"w{n}" for n in range(2)]

    def text(size):
        return " ".join(generator.choice(vocabulary, size).tolist())

    items = [text(int(size)) for size in generator.integers(13, 40, 20)]
    index = index_of(tmp_path, [{"q": item} for item in items])
    grams = set().union(*(naive_grams(item, 13) for item in items))
    found = 0
    for _ in range(300):
        document = text(int(generator.integers(5, 60)))
        shared = naive_grams(document, 13) & grams
        matches = index.matches(document)
        assert bool(matches) == bool(shared)
        for match in matches:
            assert tuple(match.gram.split()) in shared & naive_grams(items[match.row], 13)
        found += bool(shared)
    assert 30 < found < 270


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    clean = [f"document {n} about something else entirely" for n in range(60)]
    write_jsonl(folder / "in" / "a.jsonl", [*clean[:30], f"As asked: {QUESTION} The left atrium.", *clean[30:]])
    write_jsonl(folder / "in" / "b.jsonl", ["clean", SHORT + " " + QUESTION])
    (folder / "eval.jsonl").write_bytes(b"\n".join(map(orjson.dumps, ITEMS)))
    (folder / "eval.txt").write_text(f"a heading\n\n{QUESTION}\n\n")
    pq.write_table(pa.table({"n": [1], "q": [{"deep": [SHORT]}]}), folder / "eval.parquet")
    return folder


def request_of(place, tokenizer, output, **changes):
    values = {"inputs": (str(place / "in"),), "tokenizer": str(tokenizer), "output": output, "text_field": "text"}
    values |= {"split": "file", "heldout": 0.1, "license": "", "max_reject_fraction": 0.0, "workers": 1}
    return BuildRequest(**(values | {"decontaminate": (str(place / "eval.jsonl"),)} | changes))


def built(place, tokenizer, output, **changes):
    build_dataset(request_of(place, tokenizer, output, **changes))
    return Dataset.open(output)


def report(dataset):
    return [orjson.loads(line) for line in (dataset.folder / "contamination.jsonl").read_bytes().splitlines()]


def test_contaminated_documents_are_left_out_counted_and_listed_with_item_and_words(place, tokenizer, tmp_path, capsys):
    dataset = built(place, tokenizer, tmp_path / "d")
    assert dataset.manifest.rejects == {"contaminated": 2}
    assert sum(split.documents for split in dataset.manifest.splits.values()) == 61
    lines = report(dataset)
    assert [(r["file"], r["line"], r["evaluation_file"], r["evaluation_line"]) for r in lines] == [
        ("a.jsonl", 31, "eval.jsonl", 1), ("b.jsonl", 2, "eval.jsonl", 3), ("b.jsonl", 2, "eval.jsonl", 1),
    ]  # fmt: skip
    assert lines[0]["gram"] == " ".join(QUESTION.lower().split()[:13]) and lines[0]["grams"] == 6
    assert dataset.manifest.options["decontaminate"] == "eval.jsonl"
    assert verify_dataset(dataset.folder) == []
    assert "1 of 3 evaluation items have no text of 8 words" in capsys.readouterr().err
    again = built(place, tokenizer, tmp_path / "again", workers=2)
    assert shard_bytes(again.folder) == shard_bytes(dataset.folder) and report(again) == lines


def test_a_report_alone_leaves_nothing_out(place, tokenizer, tmp_path, capsys):
    dataset = built(place, tokenizer, tmp_path / "d", contaminated="report")
    assert dataset.manifest.rejects == {} and len(report(dataset)) == 3
    assert sum(split.documents for split in dataset.manifest.splits.values()) == 63
    assert "2 documents hold text of evaluation items (kept" in capsys.readouterr().err
    plain = build([place / "in"], tokenizer, tmp_path / "plain")
    assert not (plain.folder / "contamination.jsonl").exists()


@pytest.mark.parametrize(("name", "found"), [("eval.txt", 2), ("eval.parquet", 1)])
def test_every_format_of_evaluation_files_is_read(place, tokenizer, tmp_path, name, found):
    dataset = built(place, tokenizer, tmp_path / "d", decontaminate=(str(place / name),))
    assert dataset.manifest.rejects == {"contaminated": found}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"q": 1}\n{', r"--decontaminate .*bad\.jsonl:2: invalid JSON"),
        (b'{"q": "short"}\n', "none of the 1 items has 8 words"),
        (b"", "none of the 0 items has 8 words"),
    ],
)
def test_evaluation_files_that_say_nothing_are_refused_before_the_work(place, tokenizer, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        built(place, tokenizer, tmp_path / "d", decontaminate=(str(tmp_path / "bad.jsonl"),))
    with pytest.raises(DataError, match="--decontaminate .*nothing: there is no such file"):
        built(place, tokenizer, tmp_path / "d", decontaminate=(str(tmp_path / "nothing"),))
    assert not (tmp_path / "d").exists()


def test_documents_that_are_all_contaminated_are_one_message(place, tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [QUESTION, SHORT])
    with pytest.raises(DataError, match="all 2 documents hold text of evaluation items, so nothing is left"):
        built(place, tokenizer, tmp_path / "d", inputs=(str(source),))
    kept = built(place, tokenizer, tmp_path / "kept", inputs=(str(source),), contaminated="report")
    assert sum(split.documents for split in kept.manifest.splits.values()) == 2


def test_contaminated_documents_are_rows_that_could_be_used(place, tokenizer, tmp_path):
    """One row in ten is unusable, whatever becomes of the others."""
    source = write_jsonl(tmp_path / "a.jsonl", ["", "clean", *[f"{QUESTION} {n}" for n in range(8)]])
    dataset = built(place, tokenizer, tmp_path / "d", inputs=(str(source),), max_reject_fraction=0.1)
    assert dataset.manifest.rejects == {"empty text": 1, "contaminated": 8}


def test_other_evaluation_files_are_another_dataset(place, tokenizer, tmp_path):
    from data_tools.build import make_plan

    plan = make_plan(request_of(place, tokenizer, tmp_path / "d"))
    for changes in ({"decontaminate": (str(place / "eval.txt"),)}, {"contaminated": "report"}, {"decontaminate": ()}):
        other = make_plan(request_of(place, tokenizer, tmp_path / "d", **changes))
        assert other.digest() != plan.digest() and plan.differences(other)
    assert "evaluation file eval.txt is new" in " ".join(
        plan.differences(make_plan(request_of(place, tokenizer, tmp_path, decontaminate=(str(place / "eval.txt"),))))
    )
