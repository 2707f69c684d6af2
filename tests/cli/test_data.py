"""The data command, as a user types it."""

import pytest

from llamapro.cli.main import main
from llamapro.data.manifest import read_dataset_manifest
from tests.support.data import flip_bit, random_texts, save_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "text" / "a.jsonl", random_texts(50, seed=1))
    save_tokenizer(folder / "model")
    command = ["data", "build", "--input", str(folder / "text"), "--tokenizer", str(folder / "model")]
    assert main([*command, "--output", str(folder / "law"), "--heldout", "0.2", "--license", "CC-BY-4.0"]) == 0
    return folder


def test_build_reports_what_it_made_and_is_done_when_called_again(place, capsys):
    command = ["data", "build", "--input", str(place / "text"), "--tokenizer", str(place / "model")]
    assert main([*command, "--output", str(place / "law"), "--heldout", "0.2"]) == 0
    shown = capsys.readouterr()
    assert "heldout" in shown.out and "documents" in shown.out
    assert "already built" in shown.err


def test_an_option_given_twice_names_the_files_of_both(place, capsys):
    more = write_jsonl(place / "more.jsonl", random_texts(7, seed=2))
    command = [
        "data",
        "build",
        "--input",
        str(place / "text"),
        "--input",
        str(more),
        "--tokenizer",
        str(place / "model"),
    ]
    evaluation = [
        str(write_jsonl(place / name, random_texts(1, seed))) for seed, name in ((1, "e.jsonl"), (2, "f.jsonl"))
    ]
    command += ["--decontaminate", evaluation[0], "--decontaminate", evaluation[1], "--contaminated", "report"]
    assert main([*command, "--output", str(place / "both"), "--heldout", "0"]) == 0
    manifest = read_dataset_manifest(place / "both")
    assert {file.name for file in manifest.source_files} == {"text/a.jsonl", "more.jsonl"}
    assert manifest.splits["train"].documents == 57
    assert len((place / "both" / "contamination.jsonl").read_text().splitlines()) == 2


def test_pack_tells_rows_and_how_full_they_are(place, capsys):
    assert main(["data", "pack", str(place / "law"), "--sequence-length", "64"]) == 0
    assert "rows of 64 tokens" in capsys.readouterr().out
    assert [path.name for path in (place / "law" / "packs").iterdir()][0].startswith("train-64-bestfit-")
    assert main(["data", "pack", str(place / "law"), "--sequence-length", "1"]) == 2


def test_inspect_shows_facts_histogram_and_texts(place, capsys):
    assert main(["data", "inspect", str(place / "law")]) == 0
    shown = capsys.readouterr().out
    assert "CC-BY-4.0" in shown and "a.jsonl, line" in shown and "█" in shown


def test_verify_says_whole_or_names_the_damage_with_code_1(place, capsys):
    assert main(["data", "verify", str(place / "law")]) == 0
    assert "every byte checked" in capsys.readouterr().out
    shard = place / "law" / "shards" / "train-00000.bin"
    whole = shard.read_bytes()
    flip_bit(shard, 4096)
    assert main(["data", "verify", str(place / "law")]) == 1
    assert "block 0 of 'tokens'" in capsys.readouterr().err
    shard.write_bytes(whole)


def test_all_wrong_values_are_said_at_once(place, capsys):
    command = ["data", "build", "--input", "x", "--tokenizer", "x", "--output", str(place / "o"), "--heldout", "5"]
    assert (
        main([*command, "--workers", "0", "--max-reject-fraction", "nan", "--fim-rate", "2", "--fim-tokens", "a"]) == 2
    )
    said = capsys.readouterr().err
    for flag in ("--heldout 5.0", "--workers 0", "--max-reject-fraction nan", "--fim-rate 2.0", "--fim-tokens a"):
        assert said.count(flag) == 1
    assert not (place / "o").exists()


def test_what_was_left_out_is_counted_with_the_file_that_lists_it(place, tmp_path, capsys):
    texts = [" ".join(f"word{number}{place}" for place in range(9)) for number in "abcdefghi"]
    write_jsonl(tmp_path / "a.jsonl", [*texts, texts[0], ""])
    write_jsonl(tmp_path / "exam.jsonl", [texts[5]])
    command = ["data", "build", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(place / "model")]
    command += ["--output", str(tmp_path / "o"), "--heldout", "0", "--max-reject-fraction", "0.2", "--dedup", "exact"]
    assert main([*command, "--decontaminate", str(tmp_path / "exam.jsonl")]) == 0
    said = capsys.readouterr().err
    for reason, listed in (("empty text", "rejects"), ("duplicate", "rejects"), ("contaminated", "contamination")):
        assert f"1 rows were left out: {reason} (listed in {tmp_path}/o/{listed}.jsonl)" in said
        assert (tmp_path / "o" / f"{listed}.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{}/nothing"], "holds no finished dataset"),
        (["build", "--input", "{}/nothing", "--tokenizer", "{}/model", "--output", "{}/o"], "no such file or folder"),
        (["build", "--input", "{}/text", "--tokenizer", "{}/text", "--output", "{}/o"], "neither tokenizer.json nor"),
    ],
)
def test_mistakes_of_the_user_give_one_message_and_code_2(place, capsys, arguments, message):
    assert main(["data", *(argument.format(place) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "o").exists()
