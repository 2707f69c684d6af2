"""The documents listed for a sample are exactly those in its row."""

from llamapro.data.loader import SampleStream, SourceUse
from llamapro.data.packing import ensure_pack
from llamapro.data.provenance import documents_of_samples
from tests.support.data import build, random_texts, save_tokenizer, write_jsonl


def test_listed_documents_make_up_the_rows_and_name_their_lines(tmp_path):
    texts = random_texts(40, seed=1)
    first = write_jsonl(tmp_path / "in" / "a.jsonl", texts[:25])
    second = write_jsonl(tmp_path / "in" / "b.jsonl", texts[25:])
    tokenizer = save_tokenizer(tmp_path / "model")
    dataset = build([first, second], tokenizer, tmp_path / "law", heldout=0.0)
    plan = ensure_pack(dataset, "train", 64, "bestfit", None)
    stream = SampleStream([SourceUse("law", dataset, plan, 1.0, None)], (), seed=3, sequence_length=64)
    uses = documents_of_samples(stream, 2, 4)
    for g in range(2, 6):
        mine = [use for use in uses if use.sample == g]
        ids = [token for use in mine for token in use.ids.tolist()]
        assert ids == stream.sample(g).input_ids[: len(ids)].tolist()
    for use in uses:
        text = texts[use.row + {"a.jsonl": 0, "b.jsonl": 25}[use.file]]
        if use.start == 0:
            assert text.startswith(str(use.row + {"a.jsonl": 0, "b.jsonl": 25}[use.file]))
