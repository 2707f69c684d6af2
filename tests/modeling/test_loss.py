import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llamapro.modeling import loss as loss_module
from llamapro.modeling.logits import HeadSteps, Over, SoftCap, Times, Unchanged
from llamapro.modeling.loss import IGNORED_LABEL, make_loss_head

HIDDEN, VOCABULARY = 16, 50


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk, so that every test crosses chunk borders."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", {"cpu": 7 * VOCABULARY, "cuda": 7 * VOCABULARY})


def problem(
    dtype: torch.dtype = torch.float32, bias: bool = False, steps: HeadSteps | None = None
) -> tuple[nn.Linear, nn.Linear, torch.Tensor, torch.Tensor]:
    """(loss head, plain head, hidden states, labels with unscored spans)."""
    torch.manual_seed(0)
    plain = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    ours = copy.deepcopy(plain)
    make_loss_head(ours, steps or HeadSteps())
    labels = torch.randint(0, VOCABULARY, (3, 20))
    labels[0, 4:13] = IGNORED_LABEL
    labels[:, -1] = IGNORED_LABEL
    return ours, plain, torch.randn(3, 20, HIDDEN).to(dtype), labels


def plain_loss(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logits = head(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_equal_the_plain_path(bias: bool, frozen: bool) -> None:
    ours, plain, hidden, labels = problem(bias=bias)
    for head in (ours, plain):
        head.requires_grad_(not frozen)
    left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    total, losses = ours(left, labels)
    expected = plain_loss(plain, right, labels)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    (total * 0.37).backward()
    (expected * 0.37).backward()
    assert left.grad is not None and right.grad is not None
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        if frozen:
            assert mine.grad is None
        else:
            assert mine.grad is not None and theirs.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "steps",
    [
        HeadSteps(after=Times(0.3)),
        HeadSteps(after=Over(7.0)),
        HeadSteps(after=SoftCap(0.8)),
        HeadSteps(before=Over(3.0)),
    ],
    ids=["times", "over", "capped", "states over"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_steps_around_the_projection_are_in_the_loss_and_in_its_gradients(steps: HeadSteps, frozen: bool) -> None:
    ours, plain, hidden, labels = problem(bias=True, steps=steps)
    for head in (ours, plain):
        head.requires_grad_(not frozen)
    left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours(left, labels)[0].backward()

    def whole(states: torch.Tensor) -> torch.Tensor:
        return steps.after(plain(steps.before(states)))

    plain_loss(whole, right, labels).backward()
    assert torch.equal(ours(hidden), whole(hidden)) and not torch.equal(ours(hidden), plain(hidden))
    assert left.grad is not None and right.grad is not None
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7)
    if not frozen:
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)


def test_token_losses_are_those_of_each_position() -> None:
    ours, plain, hidden, labels = problem()
    _, losses = ours(hidden, labels)
    logits = plain(hidden)
    for row in range(3):
        for place in range(20):
            label = labels[row, place]
            expected = 0.0 if label == IGNORED_LABEL else -torch.log_softmax(logits[row, place], 0)[label].item()
            assert losses[row, place].item() == pytest.approx(expected, abs=1e-6)
    assert not losses.requires_grad


def test_in_bf16_the_gradient_is_as_near_to_float32_as_the_plain_path_is() -> None:
    ours, plain, hidden, labels = problem(torch.bfloat16)
    gradients = []
    for compute in (lambda h: ours(h, labels)[0], lambda h: plain_loss(plain, h, labels)):
        states = hidden.clone().requires_grad_()
        (compute(states) * 0.1).backward()
        assert states.grad is not None
        gradients.append(states.grad.float())
    exact = hidden.float().requires_grad_()
    (plain_loss(plain.float(), exact, labels) * 0.1).backward()
    assert exact.grad is not None
    mine, theirs = (((gradient - exact.grad).norm() / exact.grad.norm()).item() for gradient in gradients)
    assert mine < 1.25 * theirs
    assert total_bias(gradients[0], exact.grad) < 1e-3


def total_bias(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    """How far the length along the exact gradient is off: what rounding the scale itself would cause."""
    return abs(float((gradient * exact).sum() / (exact * exact).sum()) - 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_any_target_the_loss_is_zero_and_still_connected(dtype: torch.dtype) -> None:
    ours, _, hidden, labels = problem(dtype)
    hidden.requires_grad_()
    total, losses = ours(hidden, torch.full_like(labels, IGNORED_LABEL))
    assert total.item() == 0.0 and total.requires_grad and not losses.any()
    total.backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert ours.weight.grad is not None and not ours.weight.grad.any()


def test_positions_without_target_get_exactly_zero_gradient() -> None:
    ours, _, hidden, labels = problem()
    hidden.requires_grad_()
    ours(hidden, labels)[0].backward()
    assert hidden.grad is not None
    assert not hidden.grad[labels == IGNORED_LABEL].any()
    assert hidden.grad[labels != IGNORED_LABEL].abs().sum(-1).min() > 0


def test_a_token_far_below_the_top_keeps_its_finite_loss() -> None:
    ours, _, hidden, labels = problem()
    with torch.no_grad():
        ours.weight.mul_(1000)
    total, _ = ours(hidden, labels)
    assert total.isfinite() and total > 1000


def test_no_logits_of_the_whole_sequence_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    real = loss_module.plain_linear
    monkeypatch.setattr(loss_module, "plain_linear", lambda x, w, b: rows.append(len(x)) or real(x, w, b))
    ours, _, hidden, labels = problem()
    ours(hidden, labels)
    assert max(rows) == 7 and sum(rows) == int((labels != IGNORED_LABEL).sum())


def test_what_is_kept_for_the_backward_pass_is_as_large_as_the_scored_states() -> None:
    ours, _, hidden, labels = problem()
    ours.requires_grad_(False)
    sizes: list[int] = []
    states = hidden.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        ours(states, labels)
    scored = int((labels != IGNORED_LABEL).sum())
    indices = 3 * scored * 8  # what selecting the scored positions keeps
    assert sum(sizes) <= scored * HIDDEN * 4 + indices


def test_without_autograd_no_gradient_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, hidden, labels = problem()
    monkeypatch.setattr(loss_module._Gradients, "add", lambda *_: pytest.fail("formed a gradient"))
    with torch.no_grad():
        total, _ = ours(hidden, labels)
    assert not total.requires_grad


def test_static_shapes_give_the_same_as_selected_positions() -> None:
    """Devices other than the CPU compute every position and mask: that path is taken here by hand."""
    ours, _, hidden, labels = problem()
    selected, every = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    total, losses = ours(selected, labels)
    masked_total, masked_losses = loss_module._ChunkedCrossEntropy.apply(
        every.flatten(0, 1), ours.weight, None, labels.flatten(), Unchanged(), loss_module.chunk_loss, True
    )
    torch.testing.assert_close(masked_total, total)
    torch.testing.assert_close(masked_losses.view(3, 20), losses)
    total.backward()
    by_selection = ours.weight.grad.clone()
    ours.weight.grad = None
    masked_total.backward()
    torch.testing.assert_close(every.grad, selected.grad)
    torch.testing.assert_close(ours.weight.grad, by_selection)


def test_without_labels_it_is_the_plain_head() -> None:
    ours, plain, hidden, _ = problem()
    assert torch.equal(ours(hidden), plain(hidden))
