"""The model card: valid metadata, the run's recipe and results, nothing local."""

from pathlib import Path

import orjson
import pytest
import torch
from huggingface_hub import ModelCard

from llamapro.evaluation.results import ModelResult, Results, SetResult, write_results
from llamapro.expansion.expand import expand
from llamapro.export.export import export
from llamapro.export.terms import Terms, terms_of
from tests.support.data import build, save_tokenizer, write_jsonl
from tests.support.exports import STEP, TinyRun, make_run, step_line, validation, write_checkpoint
from tests.support.models import save_tiny_llama


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return make_run(tmp_path)


def test_card_states_base_recipe_data_and_results(tiny: TinyRun, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    card.data.to_dict()
    assert card.data.base_model == "tests/tiny-llama"
    assert card.data.pipeline_tag == "text-generation"
    for stated in (
        "expanded from 4 to 6 blocks, trained on law, wiki",
        f"| optimizer steps | {STEP} |",
        "| trained blocks | 2, 5 |",
        f"| tokens trained on | {512 * STEP:,} |",
        "| law | 80% of the tokens | not recorded |",
        "| law | 1.2500 | 1.0000 | -20.0% |",
        "39 of 39 base tensors are bit-identical",
        "`LICENSE`",
    ):
        assert stated in card.text, stated
    assert str(tmp_path) not in card.content


def test_card_of_an_earlier_checkpoint_does_not_claim_what_came_later(tiny: TinyRun, tmp_path: Path) -> None:
    lines = [step_line(step) for step in range(STEP + 1, 31)] + [validation(30, 0.5, 1.6)]
    with (tiny.folder / "metrics.jsonl").open("ab") as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in lines)
    write_checkpoint(tiny.folder, tiny.masters, tiny.record, step=30)
    export(tiny.checkpoint, tmp_path / "early")
    export(tiny.folder, tmp_path / "late")
    assert "| law | 1.2500 | 1.0000 | -20.0% |" in (tmp_path / "early/README.md").read_text()
    assert "| law | 1.2500 | 0.5000 | -60.0% |" in (tmp_path / "late/README.md").read_text()


def test_card_shows_an_evaluation_that_the_run_holds(tiny: TinyRun, tmp_path: Path) -> None:
    scored = SetResult(
        dataset="data/law",
        dataset_fingerprint="f",
        split="heldout",
        loss=2.5,
        loss_half_width=0.1,
        bits_per_byte=0.875,
        bits_per_byte_half_width=0.0125,
        tokens=12345,
        bytes=50000.0,
        rows=8,
    )
    model = ModelResult(name=str(tmp_path / "somewhere/law-model"), digest="d", sets={"law": scored})
    (tiny.folder / "evaluation").mkdir()
    write_results(tiny.folder / "evaluation", Results(settings={}, versions={}, model=model))
    export(tiny.folder, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| law | 0.8750 ± 0.0125 | 12,345 |" in card
    assert "`llamapro evaluate` of law-model" in card
    assert str(tmp_path) not in card


def test_base_that_is_no_hub_id_is_not_claimed_as_one(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, base_id="my-llama")
    export(tiny.folder, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model is None


def test_licence_and_terms_of_the_base_go_all_the_way(tmp_path: Path) -> None:
    """From the base's card through expansion, export, a second expansion, whatever else that card says."""
    base = save_tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    stated = "license: other\nlicense_name: tiny-1\nlicense_link: LICENSE.txt\ndatasets: 7\n"
    (base / "README.md").write_text(f"---\n{stated}---\n# Tiny\n")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"):
        (base / name).write_text(f"terms in {name}")
    tiny = make_run(tmp_path, base=base)
    export(tiny.folder, tmp_path / "out")
    expand(str(tmp_path / "out"), tmp_path / "second", new_blocks=2)
    for folder in (tmp_path / "out", tmp_path / "second"):
        assert (folder / "BASE_MODEL_CARD.md").read_bytes() == (base / "README.md").read_bytes()
        for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "tiny-1", "LICENSE.txt")
    assert "The base model's licence is tiny-1 (LICENSE.txt)." in card.text
    assert "`LICENSE.txt`, `NOTICE`, `USE_POLICY.md`" in card.text


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("---\nlicense: llama2\n---\ntext", "llama2"),
        ("---\r\nlicense:\r\n- mit\r\n---\r\ntext", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("no front matter\n---\nlicense: mit\n---\n", None),
        ("---\nlanguage: en\n---\n", None),
        ("", None),
    ],
)
def test_licence_is_what_the_card_states_and_nothing_else(card: str, known: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert terms_of(tmp_path, []) == Terms(known)


def test_card_that_can_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert terms_of(tmp_path, [Path("LICENSE")]) == Terms(files=("LICENSE",))
    assert "licence of the base is not known" in capsys.readouterr().err


def test_data_licences_are_those_that_the_datasets_state(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "law.jsonl", ["the law of the land"] * 3)
    dataset = build([tmp_path / "law.jsonl"], tmp_path / "tokenizer", tmp_path / "data", license="CC-BY-4.0")
    config = tiny.folder / "config.yaml"
    config.write_text(config.read_text().replace("nowhere/law", str(dataset.folder)))
    export(tiny.folder, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md").text
    assert "| law | 80% of the tokens | CC-BY-4.0 |" in card
    assert "| wiki | 20% of the tokens | not recorded |" in card
    assert "Those of the training data are in the table above." in card


def test_card_of_a_model_folder_goes_along_and_what_is_exported_generates_with_its_cache(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    (tiny.model / "README.md").write_text("---\nlicense: mit\n---\n")
    (tiny.model / "generation_config.json").write_text('{"use_cache": false, "temperature": 0.5}')
    export(tiny.folder, tmp_path / "out")
    generation = orjson.loads((tmp_path / "out/generation_config.json").read_bytes())
    assert generation == {"use_cache": True, "temperature": 0.5}
    assert (tmp_path / "out/BASE_MODEL_CARD.md").read_bytes() == (tiny.model / "README.md").read_bytes()
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "mit"
