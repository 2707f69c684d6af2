"""With all new blocks bypassed a trained model scores as its base, bit for bit; each block's part is measured."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llamapro.data.dataset import Dataset
from llamapro.data.heldout import heldout_batches
from llamapro.data.loader import Batch
from llamapro.evaluation.bypass import loss_difference, score_blocks
from llamapro.evaluation.text import RowScore, TextScore, evaluate_text, score_rows
from llamapro.export.export import export
from llamapro.modeling.build import build_model
from llamapro.modeling.model import LanguageModel, LossOutput
from llamapro.modeling.trainable import TrainableSet
from llamapro.ranks import Ranks
from tests.support.exports import make_run
from tests.support.texts import LAW, write_text_dataset


def build(folder: Path) -> LanguageModel:
    nothing = TrainableSet.of(())
    return build_model(folder, dtype=torch.float32, device=torch.device("cpu"), trainable=nothing, record=None)


def test_bypassing_new_blocks_gives_the_base_and_single_blocks_their_part(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, dtype=torch.float32)
    export(tiny.folder, tmp_path / "out")
    batches = heldout_batches(Dataset.open(write_text_dataset(tmp_path / "law", tiny.base, LAW)), 128, 8, 4)
    model, base = build(tmp_path / "out"), build(tiny.base)

    def loss_of(scored: LanguageModel, batch: Batch) -> LossOutput:
        arrays = (batch.input_ids, batch.labels, batch.position_ids)
        output: LossOutput = scored(*map(torch.from_numpy, arrays))
        return output

    def loss(batch: Batch) -> LossOutput:
        return loss_of(model, batch)

    new_blocks = tiny.record.new_blocks
    scores = score_blocks(loss, model.bypassed, new_blocks, batches, Ranks.solo())
    assert scores.without.keys() == set(new_blocks)
    assert all(abs(scores.loss_increase(block).value) > 1e-4 for block in new_blocks)
    base_score = evaluate_text(lambda batch: loss_of(base, batch), batches, Ranks.solo())
    assert base_score.loss != scores.whole.loss
    with model.bypassed(new_blocks):
        assert evaluate_text(loss, batches, Ranks.solo()) == base_score
    with model.bypassed(new_blocks[:1]):
        single = evaluate_text(loss, batches, Ranks.solo()).loss
    assert scores.loss_increase(new_blocks[0]).value == pytest.approx(single - scores.whole.loss)
    first, second = (scores.loss_increase(block).value for block in new_blocks)
    assert scores.difference(*new_blocks).value == pytest.approx(first - second)


def test_errors_are_those_of_the_paired_differences_of_rows() -> None:
    """Rows differ far more among themselves than with and without a block: unpaired errors would be 100 times wider."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(20, 60, size=40)
    before = tokens * generator.uniform(1, 9, size=40)
    after = before + tokens * generator.normal(0.5, 0.01, size=40)

    def scored(sums: NDArray[np.float64]) -> TextScore:
        return score_rows([RowScore(total, int(count), 1.0) for total, count in zip(sums, tokens, strict=True)])

    whole, without = scored(before), scored(after)
    found = loss_difference(without, whole)
    assert found.value == pytest.approx((after - before).sum() / tokens.sum())
    ratio = (after - before).sum() / tokens.sum()
    variance = 40 / 39 * ((after - before - ratio * tokens) ** 2).sum() / tokens.sum() ** 2
    assert found.half_width == pytest.approx(2.0227 * variance**0.5, rel=1e-4)
    assert found.half_width is not None and whole.loss_half_width is not None
    assert found.half_width < 0.01 < 0.5 < whole.loss_half_width
