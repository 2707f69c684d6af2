"""With all new blocks bypassed a trained model scores as its base, bit for bit; each block's part is measured."""

from pathlib import Path

import pytest
import torch

from llamapro.data.dataset import Dataset
from llamapro.data.heldout import heldout_batches
from llamapro.data.loader import Batch
from llamapro.evaluation.bypass import block_contributions
from llamapro.evaluation.text import evaluate_text
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
    whole, increases = block_contributions(loss, model.bypassed, new_blocks, batches, Ranks.solo())
    assert increases.keys() == set(new_blocks)
    assert all(abs(increase) > 1e-4 for increase in increases.values())
    base_score = evaluate_text(lambda batch: loss_of(base, batch), batches, Ranks.solo())
    assert base_score.loss != whole.loss
    with model.bypassed(new_blocks):
        assert evaluate_text(loss, batches, Ranks.solo()) == base_score
    with model.bypassed(new_blocks[:1]):
        single = evaluate_text(loss, batches, Ranks.solo()).loss
    assert increases[new_blocks[0]] == pytest.approx(single - whole.loss)
