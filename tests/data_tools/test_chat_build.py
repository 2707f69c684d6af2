"""Datasets of conversations: the same bytes however they are built, masks that reach the labels, rows left out."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data_tools.build import make_plan
from data_tools.chat.options import ChatRequest
from data_tools.chat.scored import scored_spans, with_marks, without_marks
from data_tools.chat.show import marked_text
from data_tools.command import main
from data_tools.inspect import facts_of, samples_of
from data_tools.request import BuildRequest
from llamapro.data.dataset import Dataset
from llamapro.data.heldout import heldout_batches
from llamapro.data.rows import IGNORED
from llamapro.data.verify import verify_dataset
from llamapro.errors import DataError, UserError
from tests.support.chats import TWO_ROUNDS, build_chats, learned_ids, save_byte_level, write_rows
from tests.support.data import shard_bytes

CHATML = ChatRequest(template="chatml")


def conversations(count: int) -> list[list[dict[str, str]]]:
    generator = np.random.default_rng(5)
    found = []
    for number in range(count):
        messages = [] if number % 3 else [{"role": "system", "content": f"rule {number}"}]
        for turn in range(int(generator.integers(1, 4))):
            messages.append({"role": "user", "content": f"question {number} {turn} été?"})
            messages.append({"role": "assistant", "content": "answer " * int(generator.integers(1, 9)) + str(number)})
        found.append(messages)
    return found


ROWS = [{"messages": messages} for messages in conversations(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("model"), "chatml")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "chats.jsonl", ROWS)


@pytest.fixture(scope="module")
def built(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build_chats([rows], model, tmp_path_factory.mktemp("built") / "chats", CHATML, heldout=0.2)


def decoded(model: Path, ids: list[int]) -> str:
    return str(Tokenizer.from_file(str(model / "tokenizer.json")).decode(ids, skip_special_tokens=False))


def test_every_documents_learned_tokens_are_its_answers(built: Dataset, model: Path) -> None:
    found = learned_ids(built) | learned_ids(built, "heldout")
    assert found.keys() == set(range(len(ROWS))) and built.split("heldout").documents > 0
    for row, (ids, learned) in found.items():
        answers = [m["content"] for m in ROWS[row]["messages"] if m["role"] == "assistant"]
        assert decoded(model, learned) == "".join(f"{answer}<|im_end|>" for answer in answers)
        shown = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in ROWS[row]["messages"])
        assert decoded(model, ids) == shown
    assert verify_dataset(built.folder) == []


def test_text_bytes_are_those_of_what_is_learned(built: Dataset, model: Path) -> None:
    for shard in built.split("train").shards:
        for index in range(shard.facts.documents):
            ids = shard.document(index)
            learned = [token for start, stop in shard.loss_spans(index) or () for token in ids[start:stop].tolist()]
            assert int(shard.column("text_bytes")[index]) == len(decoded(model, learned).encode())


def test_labels_are_the_learned_tokens_and_nothing_else(built: Dataset) -> None:
    expected = sorted(learned for _, learned in learned_ids(built, "heldout").values())
    found = []
    for batch, _ in heldout_batches(built, 1024, 100, 1):
        labels, positions = batch.labels[0], batch.position_ids[0]
        starts = [*np.flatnonzero(positions == 0).tolist(), labels.size]
        for start, stop in zip(starts, starts[1:], strict=False):
            piece = labels[start:stop]
            if (piece != IGNORED).any():
                found.append(piece[piece != IGNORED].tolist())
    assert sorted(found) == expected


def test_workers_units_and_shards_change_no_document(
    built: Dataset, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = build_chats([rows], model, tmp_path / "again", CHATML, heldout=0.2, workers=2)
    assert shard_bytes(again.folder) == shard_bytes(built.folder)
    monkeypatch.setattr("data_tools.inputs.UNIT_BYTES", 3000)
    monkeypatch.setattr("data_tools.plan.SHARD_TEXT_BYTES", 9000)
    many = build_chats([rows], model, tmp_path / "many", CHATML, heldout=0.2)
    assert len(many.split("train").shards) > 2
    assert _by_text(many) == _by_text(built)


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    built: Dataset, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "chats"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_tools.build.seal_dataset", cut_off)
        build_chats([rows], model, output, CHATML, heldout=0.2)
    entry = output / ".building" / "units" / "000000" / "entry.json"
    assert orjson.loads(entry.read_bytes())["documents"] == len(ROWS)
    with pytest.raises(DataError, match="--loss-on was assistant and is last"):
        build_chats([rows], model, output, ChatRequest(template="chatml", loss_on="last"), heldout=0.2)
    assert shard_bytes(build_chats([rows], model, output, CHATML, heldout=0.2).folder) == shard_bytes(built.folder)


def _by_text(dataset: Dataset) -> list[Any]:
    return sorted((*learned_ids_of_rows(dataset, split), split) for split in ("train", "heldout"))


def learned_ids_of_rows(dataset: Dataset, split: Any) -> tuple[Any, ...]:
    return tuple(sorted(learned_ids(dataset, split).items()))


def test_containers_give_the_same_documents(built: Dataset, model: Path, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("array.json", "lines.jsonl.gz", "table.parquet")]
    places[0].write_bytes(orjson.dumps(ROWS, option=orjson.OPT_INDENT_2))
    places[1].write_bytes(gzip.compress(b"\n".join(map(orjson.dumps, ROWS))))
    pq.write_table(pa.Table.from_pylist(ROWS), places[2], row_group_size=50)
    for place in places:
        found = build_chats([place], model, tmp_path / place.stem / "out", CHATML, heldout=0.2)
        assert learned_ids(found) == learned_ids(built), place.name


def test_formats_give_the_same_documents(model: Path, tmp_path: Path) -> None:
    pairs = [(f"question {number}", f"answer {number}") for number in range(30)]
    kinds = {
        "messages": [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                     for a, b in pairs],
        "sharegpt": [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs],
        "alpaca": [{"instruction": a, "input": "", "output": b} for a, b in pairs],
        "prompt-completion": [{"prompt": a, "completion": b} for a, b in pairs],
    }  # fmt: skip
    found = []
    for name, values in kinds.items():
        place = write_rows(tmp_path / f"{name}.jsonl", values)
        dataset = build_chats([place], model, tmp_path / name, CHATML)
        assert dataset.manifest.options["format"] == name
        found.append(learned_ids(dataset))
    assert all(other == found[0] for other in found[1:])


def test_long_conversations_are_cut_counted_and_left_out_where_no_answer_is_left(model: Path, tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "abcdefgh " * 20}
    long_question = {"role": "user", "content": "0123456789 " * 20}
    rows = [{"messages": m} for m in ([question, answer], [long_question, answer], [question, TWO_ROUNDS[2]])]
    place = write_rows(tmp_path / "rows.jsonl", rows)
    chat = ChatRequest(template="chatml", max_tokens=60)
    dataset = build_chats([place], model, tmp_path / "cut", chat, max_reject_fraction=0.5)
    whole = learned_ids(build_chats([place], model, tmp_path / "whole", CHATML))
    found = learned_ids(dataset)
    assert found.keys() == {0, 2} and found[2] == whole[2]
    assert found[0][0] == whole[0][0][:60]
    assert found[0][1] == whole[0][1][: len(found[0][1])] and len(found[0][1]) > 30
    assert dataset.manifest.rejects == {"no token of an answer within --max-tokens": 1}
    lost = sum(len(whole[row][0]) - 60 for row in (0, 1))
    stated = dataset.manifest.options
    assert (stated["max_tokens"], stated["cut_conversations"], stated["cut_tokens"]) == ("60", "2", str(lost))


def test_equal_conversations_are_found_with_their_masks(model: Path, tmp_path: Path) -> None:
    place = write_rows(tmp_path / "rows.jsonl", [*ROWS[:5], *ROWS[:3], *ROWS[5:9]])
    dataset = build_chats([place], model, tmp_path / "out", CHATML, dedup="exact")
    whole = learned_ids(build_chats([place], model, tmp_path / "whole", CHATML))
    kept = learned_ids(dataset)
    assert kept.keys() == {0, 1, 2, 3, 4, 8, 9, 10, 11}
    assert all(kept[row] == whole[row] for row in kept)


def test_bad_rows_are_counted_by_reason_and_listed(model: Path, tmp_path: Path) -> None:
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": "x"}]}, {"text": "x"}, [1]]
    place = write_rows(tmp_path / "rows.jsonl", [*ROWS[:20], *bad])
    with pytest.raises(DataError, match=r"(?s)4 of 24 rows can't be used.*name the right --format"):
        build_chats([place], model, tmp_path / "out", CHATML)
    dataset = build_chats([place], model, tmp_path / "out", CHATML, max_reject_fraction=0.2)
    assert dataset.manifest.rejects == {
        "no field 'messages' or 'conversations'": 1,
        "no messages": 1,
        "not a JSON object": 1,
        "the last message is not the assistant's": 1,
    }
    listed = [orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines()]
    assert [(line["line"], line["reason"]) for line in listed][0] == (21, "no messages")


def test_loss_on_all_has_no_spans(model: Path, rows: Path, tmp_path: Path) -> None:
    dataset = build_chats([rows], model, tmp_path / "all", ChatRequest(template="chatml", loss_on="all"))
    assert not any(shard.has_loss_spans for shard in dataset.split("train").shards)


def test_the_dataset_keeps_the_template_and_shows_the_mask(built: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    kept = (built.folder / "tokenizer" / "chat_template.jinja").read_text()
    assert "generation" in kept and verify_dataset(built.folder) == []
    sample = samples_of(built, 1)[0]
    shown = sample.shown(10_000)
    answers = [m["content"] for m in ROWS[sample.row]["messages"] if m["role"] == "assistant"]
    assert [part.split("⟧")[0] for part in shown.split("⟦")[1:]] == [f"{answer}<|im_end|>" for answer in answers]
    facts = dict(facts_of(built))
    assert facts["conversations"].startswith("messages, template chatml (") and "%" in facts["learned"]


def test_of_a_long_document_the_answer_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (("question " * 100, False), ("answer " * 100, True), ("more", False))
    shown = marked_text(parts, 300)
    assert shown.startswith("question question") and "⟦answer" in shown and shown.index("⟧") < 350
    assert marked_text((("a" * 400, False), ("b" * 400, True), ("c" * 400, False), ("d", True)), 90).endswith("…")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert marked_text((("q", False), ("a", True)), 300) == "q\x1b[32ma\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert marked_text((("q", False), ("a", True)), 300) == "q⟦a⟧"


def test_the_command_shows_a_sample(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(rows), "--tokenizer", str(model), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--chat-template", "chatml"]) == 0
    out = capsys.readouterr().out
    assert "⟦answer" in out and "<|im_end|>⟧" in out and "learned: assistant:" in out


def test_text_is_built_as_before_and_told_apart(model: Path, tmp_path: Path) -> None:
    place = write_rows(tmp_path / "text.jsonl", [{"text": f"text {n}", "messages": TWO_ROUNDS} for n in range(3)])
    dataset = build_chats([place], model, tmp_path / "text", ChatRequest())
    assert "chat_template" not in dataset.manifest.options and dataset.manifest.eos_inserted
    array = tmp_path / "array.json"
    array.write_bytes(orjson.dumps([{"text": f"text {n}"} for n in range(3)]))
    assert learned_ids(build_chats([array], model, tmp_path / "array", ChatRequest())) == learned_ids(dataset)


PROBLEMS: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"chat": ChatRequest(template="chatlm")}, DataError, r"--chat-template chatlm: there is no such file.*chatml"),
    ({"chat": ChatRequest()}, DataError, r"--chat-template model: .* has no chat template"),
    ({"chat": ChatRequest(max_tokens=0)}, UserError, r"--max-tokens 0: give at least 1"),
    ({"chat": ChatRequest(format="alpaca", template="chatml")}, DataError,
     r"no usable document: 120 × no field 'instruction'. Name the right --format"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), PROBLEMS)
def test_wrong_options_are_one_message_before_anything_is_written(
    model: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_chats([rows], model, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_template_with_a_mistake_names_its_line(model: Path, rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfro %}")
    with pytest.raises(DataError, match=r"own\.jinja: line 3: .*endfro"):
        build_chats([rows], model, tmp_path / "out", ChatRequest(template=str(own)))


def test_inputs_of_different_kinds_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"different kinds \(messages: .*chats.jsonl; alpaca: .*other.jsonl\)"):
        build_chats([rows, other], model, tmp_path / "out", CHATML)


def test_another_template_does_not_continue_a_build(model: Path, rows: Path, tmp_path: Path) -> None:
    def plan(chat: ChatRequest) -> Any:
        values = {"text_field": "text", "split": "file", "heldout": 0.0, "license": "", "max_reject_fraction": 0.0}
        return make_plan(BuildRequest((str(rows),), str(model), tmp_path / "o", workers=1, chat=chat, **values))  # type: ignore[arg-type]

    first = plan(CHATML)
    own = tmp_path / "own.jinja"
    own.write_text(first.options.chat.template + " ")
    for other in (ChatRequest(template="chatml", loss_on="last"), ChatRequest(template=str(own))):
        assert plan(other).digest() != first.digest() and first.differences(plan(other))


def test_marks_come_back_as_spans() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 6, size=generator.integers(0, 5))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        scored = generator.random(int(offsets[-1])) < 0.5
        ids = generator.integers(0, 1 << 31, size=scored.size).astype(np.uint32)
        marked = with_marks(ids, scored)
        firsts, flat = scored_spans(marked, offsets)
        again = np.zeros(scored.size, dtype=bool)
        for document, (low, high) in enumerate(zip(firsts[:-1], firsts[1:], strict=True)):
            for start, stop in flat.reshape(-1, 2)[low:high].tolist():
                assert 0 <= start < stop <= lengths[document]
                again[offsets[document] + start : offsets[document] + stop] = True
        assert np.array_equal(again, scored) and np.array_equal(without_marks(marked), ids)
