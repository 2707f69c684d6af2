"""The systems compared train the same tokens, and ratios are taken within rounds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.train_cpu import EAGER, OURS, SYSTEMS, ratios, summary
from benchmarks.train_systems import Settings, batches, documents, frozen_but_new, next_token_labels, padded
from llamapro.expansion.expand import expand
from llamapro.training.tokenizer import model_tokenizer_identity
from tests.support.datasets import write_dataset
from tests.support.models import save_tiny_llama

SETTINGS = Settings(rows=4, length=64, steps=2, warmup=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    base = save_tiny_llama(folder / "base", blocks=4)
    expand(str(base), folder / "expanded", new_blocks=2, dtype="bf16")
    identity = model_tokenizer_identity(folder / "expanded")
    for seed, name in enumerate(("hpo", "wiki")):
        write_dataset(folder / "data" / name, identity, train=90, heldout=4, seed=seed)
    return folder


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != OURS])
def test_every_system_runs_and_counts_the_same_tokens(work: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", "benchmarks.train_systems", name, str(work), str(tmp_path)]
    done = subprocess.run([*command, json.dumps(vars(SETTINGS))], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["seconds"]) == SETTINGS.steps + SETTINGS.warmup and min(found["seconds"]) > 0
    assert found["bytes_above_model"] > 0
    expected = np.mean([batch.valid_tokens for batch in batches(work, SETTINGS)[SETTINGS.warmup :]])
    assert found["tokens_per_step"] == expected


def test_padded_rows_hold_the_documents_of_the_packed_ones(work: Path) -> None:
    (first, *_) = batches(work, SETTINGS)
    found = list(documents(first))
    assert sum(int((labels >= 0).sum()) for _, labels in found) == first.valid_tokens
    ids, labels, mask = padded(found)
    for row, (document, targets) in enumerate(found):
        assert mask[row].sum() == len(document)
        assert ids[row, : len(document)].tolist() == document.tolist()
        assert (
            labels[row, : len(document)].tolist() == targets.tolist() and (labels[row, len(document) :] == -100).all()
        )


def test_labels_shifted_by_transformers_are_the_packed_rows_own(work: Path) -> None:
    (first, *_) = batches(work, SETTINGS)
    labels = next_token_labels(first)
    assert torch.equal(labels[:, 1:], torch.from_numpy(first.labels)[:, :-1])


def test_only_new_blocks_learn_in_the_systems_compared(work: Path) -> None:
    learning = {name for name, parameter in frozen_but_new(work).named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in learning} == {"2", "5"}


def test_ratios_are_medians_of_ratios_within_rounds() -> None:
    rounds = [
        {
            OURS: {"tokens_per_second": ours, "bytes_above_model": 10 << 20},
            EAGER: {"tokens_per_second": theirs, "bytes_above_model": 40 << 20},
        }
        for ours, theirs in ((100.0, 50.0), (30.0, 10.0), (90.0, 90.0))
    ]
    assert ratios(rounds, EAGER, "tokens_per_second") == 2.0
    assert summary(rounds)[1] == (EAGER, "50", "2.00", "40", "0.25")


def test_without_the_quickstart_s_model_it_says_how_to_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train_cpu", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "make quickstart" in done.stderr
