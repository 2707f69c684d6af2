"""Divergence from the base against a plain implementation with full float32 logits and torch's own autograd."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from llamapro.expansion.record import ExpansionRecord
from llamapro.modeling import loss as loss_module
from llamapro.modeling import replay as replay_module
from llamapro.modeling.attention import document_boundaries
from llamapro.modeling.logits import Over, SoftCap, Step, Times, Unchanged
from llamapro.modeling.loss import IGNORED_LABEL
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.recompute import recompute_blocks
from llamapro.modeling.replay import Replay, divergence
from llamapro.modeling.trainable import TrainableSet
from tests.support.exports import block_of
from tests.support.modeling import expanded_llama, packed_rows, plain_logits, plain_model, ready_model

LENGTHS = [[40, 24], [64], [10, 30, 24]]
ROWS = [0, 2]
WEIGHT = 0.7


@pytest.fixture(params=[1 << 23, 700], ids=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", request.param)
    yield


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    "step", [Unchanged(), Times(0.3), Over(2.0), SoftCap(1.5)], ids=lambda step: type(step).__name__
)
def test_value_and_gradient_are_those_of_plain_autograd(step: Step) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, base_hidden, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((2, 9, 12), (2, 9, 12), (31, 12), (31,))
    )
    shares = torch.rand((2, 9), generator=generator) * (torch.rand((2, 9), generator=generator) > 0.3)
    states, plain = (hidden.clone().requires_grad_() for _ in range(2))
    total, without_shares = divergence(states, weight, bias, base_hidden, shares, step)
    (2.5 * total).backward()
    base = torch.log_softmax(logits_of(base_hidden, weight, bias, step), -1)
    own = torch.log_softmax(logits_of(plain, weight, bias, step), -1)
    expected = F.kl_div(own, base, log_target=True, reduction="none").sum(-1)
    (2.5 * (expected * shares).sum()).backward()
    torch.testing.assert_close(total, (expected * shares).sum())
    torch.testing.assert_close(without_shares, (expected.detach() * (shares != 0)).sum())
    torch.testing.assert_close(states.grad, plain.grad)


def test_softmax_is_in_float32_where_states_are_in_bf16() -> None:
    generator = torch.Generator().manual_seed(1)
    states, base_states, weight = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 12), (40, 12), (31, 12))
    )
    total, _ = divergence(states.requires_grad_(), weight, None, base_states, torch.ones(40), Unchanged())
    total.backward()
    log_own, log_base = (torch.log_softmax(F.linear(x, weight).double(), -1) for x in (states.detach(), base_states))
    torch.testing.assert_close(total.double(), (log_base.exp() * (log_base - log_own)).sum(), rtol=1e-5, atol=0)
    gradient = ((log_own.exp() - log_base.exp()) @ weight.double()).bfloat16()
    assert (states.grad - gradient).norm() <= 0.01 * gradient.norm()


def test_no_more_rows_of_logits_are_in_memory_than_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models' logits, so half as many rows at once."""
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 31 * 8)
    of_chunk = Mock(wraps=replay_module.chunk_divergence)
    monkeypatch.setattr(replay_module, "chunk_divergence", of_chunk)
    states = torch.randn(2, 9, 12, requires_grad=True)
    divergence(states, torch.randn(31, 12), None, torch.randn(2, 9, 12), torch.ones(2, 9), Unchanged())
    assert [call.args[0].shape for call in of_chunk.call_args_list] == [(4, 31)] * 4 + [(2, 31)]


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, step: Step) -> torch.Tensor:
    projected = F.linear(hidden, weight, bias)
    match step:
        case Times(factor):
            return projected * factor
        case Over(divisor):
            return projected / divisor
        case SoftCap(cap):
            return torch.tanh(projected / cap) * cap
        case _:
            return projected


def test_equal_predictions_diverge_by_nothing_and_pull_nowhere() -> None:
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    total, without_shares = divergence(hidden, torch.randn(20, 8), None, hidden.detach(), torch.ones(3, 5), Unchanged())
    total.backward()
    assert total.item() == without_shares.item() == 0.0 and hidden.grad is not None and not hidden.grad.any()


def test_a_head_that_learns_is_no_bases_head() -> None:
    states, weight = torch.randn(1, 2, 8), torch.randn(20, 8, requires_grad=True)
    with pytest.raises(AssertionError, match="must not learn"):
        divergence(states, weight, None, states, torch.ones(1, 2), Unchanged())


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExpansionRecord]:
    return expanded_llama(tmp_path_factory.mktemp("replay"))


def trained_model(folder: Path, record: ExpansionRecord) -> LanguageModel:
    """Its new blocks moved, so that it is its base no longer."""
    model = ready_model(folder, TrainableSet.of(record.new_blocks)).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def replay_of(record: ExpansionRecord, position_ids: torch.Tensor, rows: list[int], weight: float = WEIGHT) -> Replay:
    return Replay(torch.tensor(rows), document_boundaries(position_ids[rows]), weight, record.new_blocks)


@pytest.mark.usefixtures("chunks")
def test_loss_and_gradients_are_those_of_two_plain_transformers_models(
    expanded: tuple[Path, ExpansionRecord],
) -> None:
    """One holds the base, one what was trained; each sees one document at a time."""
    folder, record = expanded
    model = trained_model(folder, record)
    inputs, labels, positions = packed_rows(LENGTHS)
    output = model(inputs, labels, positions, None, replay_of(record, positions, ROWS))
    output.loss_sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.trainable_parameters()}
    base, own = plain_model(folder.parent / "base").eval(), plain_model(folder).eval()
    own.load_state_dict({name: tensor.detach() for name, tensor in model.hf.state_dict().items()})
    with torch.no_grad():
        base_logits = plain_logits(base, inputs, LENGTHS)
    own_logits = plain_logits(own, inputs, LENGTHS)
    log_own, log_base = (torch.log_softmax(logits.double(), -1) for logits in (own_logits, base_logits))
    divergences = (log_base.exp() * (log_base - log_own)).sum(-1) * (labels != IGNORED_LABEL)
    losses = F.cross_entropy(own_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    expected = losses + WEIGHT * divergences[ROWS].sum()
    expected.backward()
    torch.testing.assert_close(output.loss_sum.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.divergence_sum.double(), divergences[ROWS].detach().sum(), rtol=1e-4, atol=0)
    assert WEIGHT * float(divergences[ROWS].detach().sum()) > 0.01 * float(losses.detach())
    references = dict(own.named_parameters())
    assert {block_of(record, name) for name in found} == set(record.new_blocks)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, references[name].grad, rtol=1e-3, atol=1e-4)


def test_token_losses_are_those_without_replay(expanded: tuple[Path, ExpansionRecord]) -> None:
    folder, record = expanded
    model = trained_model(folder, record)
    inputs, labels, positions = packed_rows(LENGTHS)
    with_replay = model(inputs, labels, positions, None, replay_of(record, positions, ROWS))
    without = model(inputs, labels, positions)
    assert torch.equal(with_replay.row_loss_sums, without.row_loss_sums) and without.divergence_sum is None
    nothing = model(inputs, labels, positions, None, replay_of(record, positions, [1], weight=0.0))
    assert torch.equal(nothing.loss_sum, without.loss_sum) and float(nothing.divergence_sum) == 0.0


def test_recomputed_blocks_change_nothing(expanded: tuple[Path, ExpansionRecord]) -> None:
    folder, record = expanded
    inputs, labels, positions = packed_rows(LENGTHS)
    gradients = []
    for recomputed in (frozenset[int](), frozenset(range(min(record.new_blocks), record.blocks))):
        model = trained_model(folder, record)
        recompute_blocks(model.blocks, recomputed)
        model(inputs, labels, positions, None, replay_of(record, positions, ROWS)).loss_sum.backward()
        gradients.append({name: parameter.grad for name, parameter in model.trainable_parameters()})
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_a_fresh_expansion_does_not_diverge(expanded: tuple[Path, ExpansionRecord]) -> None:
    """But for rounding: fewer rows at once are multiplied in another order."""
    folder, record = expanded
    model = ready_model(folder, TrainableSet.of(record.new_blocks)).train()
    inputs, labels, positions = packed_rows(LENGTHS)
    assert abs(float(model(inputs, labels, positions, None, replay_of(record, positions, ROWS)).divergence_sum)) < 1e-4
    every_row = replay_of(record, positions, [0, 1, 2])
    assert float(model(inputs, labels, positions, None, every_row).divergence_sum) == 0.0
