"""The data command, as a user types it."""

import pytest

from llamapro.cli.main import main
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
