from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from llamapro.errors import ModelRefused, UserError
from llamapro.modeling.attention import (
    AttentionChoice,
    AttentionNeeds,
    WindowMask,
    attend,
    choose_attention,
    pack_documents,
)
from llamapro.modeling.trainable import TrainableSet
from tests.support.modeling import VOCABULARY, packed_rows, plain_logits, plain_model, ready_model
from tests.support.models import save_tiny_llama

SDPA = AttentionChoice("cpu", "test")
LENGTHS = [[40, 1, 23], [64], [13, 13, 38]]


def oracle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_ids: torch.Tensor, window: int
) -> torch.Tensor:
    """Softmax attention in float64, written out position by position."""
    rows, heads, length, width = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(rows, length, heads, width, dtype=torch.float64)
    for row in range(rows):
        begin = 0
        for place in range(length):
            if place and position_ids[row, place] != position_ids[row, place - 1] + 1:
                begin = place
            first = max(begin, place - window + 1)
            for head in range(heads):
                keys, values = key[row, head // group, first : place + 1], value[row, head // group, first : place + 1]
                weights = torch.softmax(keys.double() @ query[row, head, place].double() * width**-0.5, 0)
                output[row, place, head] = weights @ values.double()
    return output


def states(dtype: torch.dtype = torch.float32, value_width: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(1)
    shapes = [(3, 64, 4, 8), (3, 64, 2, 8), (3, 64, 2, value_width)]
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def run(name: str, tensors: list[torch.Tensor], position_ids: torch.Tensor, window: int | None) -> torch.Tensor:
    documents = pack_documents(position_ids, AttentionChoice(name, "test"))
    mask = None if window is None else WindowMask(window)
    output, weights = attend(nn.Identity(), *tensors, mask, documents=documents)
    assert weights is None
    return output


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("window", [None, 9])
def test_output_and_gradients_equal_attention_written_out(name: str, window: int | None) -> None:
    _, _, position_ids = packed_rows(LENGTHS)
    ours, theirs = states(), states()
    output = run(name, ours, position_ids, window)
    expected = oracle(*theirs, position_ids, window or 64)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)
    upstream = torch.randn(output.shape)
    output.backward(upstream)
    expected.backward(upstream.double())
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad, rtol=0, atol=2e-6)


def test_bf16_is_within_its_rounding_of_the_exact_result() -> None:
    _, _, position_ids = packed_rows(LENGTHS)
    tensors = states(torch.bfloat16)
    output = run("cpu", tensors, position_ids, None)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), oracle(*tensors, position_ids, 64), rtol=2**-7, atol=2**-7)


def test_documents_begin_where_position_ids_do_not_go_on_by_one() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 0, 1], [5, 6, 7, 3, 4, 0]])
    documents = pack_documents(position_ids, SDPA)
    assert documents.boundaries.tolist() == [0, 3, 4, 6, 9, 11, 12]


def test_a_document_never_goes_on_in_the_next_row() -> None:
    assert pack_documents(torch.tensor([[0, 1], [2, 3]]), SDPA).boundaries.tolist() == [0, 2, 4]


def test_a_document_sees_nothing_of_its_neighbours(tmp_path: Path) -> None:
    model = ready_model(save_tiny_llama(tmp_path), TrainableSet.of([]))
    inputs, _, position_ids = packed_rows([[20, 30]])
    other = inputs.clone()
    other[0, :20] = (other[0, :20] + 7) % VOCABULARY
    before, after = model.logits(inputs, position_ids), model.logits(other, position_ids)
    assert torch.equal(before[0, 20:], after[0, 20:])
    assert not torch.equal(before[0, :20], after[0, :20])


def test_sliding_window_equals_plain_transformers(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=11,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    lengths = [[30, 18], [48]]
    inputs, _, position_ids = packed_rows(lengths)
    ours = ready_model(tmp_path, TrainableSet.of([])).logits(inputs, position_ids)
    torch.testing.assert_close(ours, plain_logits(plain_model(tmp_path), inputs, lengths), rtol=0, atol=2e-6)
    config.sliding_window = None
    config.save_pretrained(tmp_path)
    unlimited = plain_logits(plain_model(tmp_path), inputs, lengths)
    assert (ours - unlimited).abs().max() > 1e-3


def test_what_is_not_computed_here_is_refused() -> None:
    documents = pack_documents(torch.arange(64).expand(3, -1), SDPA)
    with pytest.raises(ModelRefused, match="dropout"):
        attend(nn.Identity(), *states(), None, documents=documents, dropout=0.1)
    with pytest.raises(ModelRefused, match="position_bias"):
        attend(nn.Identity(), *states(), None, documents=documents, position_bias=torch.ones(1))
    with pytest.raises(ModelRefused, match="mask of its own"):
        attend(nn.Identity(), *states(), torch.ones(3, 1, 64, 64), documents=documents)


def test_fused_kernels_never_leave_out_a_cap_or_sinks_silently() -> None:
    documents = pack_documents(torch.arange(64).expand(3, -1), SDPA)
    for special in ({"softcap": 30.0}, {"s_aux": torch.ones(4)}):
        with pytest.raises(AssertionError, match="math kernel"):
            attend(nn.Identity(), *states(), None, documents=documents, **special)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_choice_states_its_reason() -> None:
    choice = choose_attention("auto", CPU, torch.bfloat16, AttentionNeeds(64))
    assert choice.name == "cpu" and "cpu" in choice.reason
    assert choose_attention("auto", CUDA, torch.bfloat16, AttentionNeeds(64)).name == "varlen"
    assert "16 bits" in choose_attention("auto", CUDA, torch.float32, AttentionNeeds(64)).reason
    assert "at most 256" in choose_attention("auto", CUDA, torch.bfloat16, AttentionNeeds(512)).reason
    assert choose_attention("math", CPU, torch.float32, AttentionNeeds(64)).reason == "asked for: math"
    assert choose_attention("sdpa", CPU, torch.float32, AttentionNeeds(64)).name == "cpu"
    assert choose_attention("sdpa", CUDA, torch.float32, AttentionNeeds(64)).name == "efficient"
    assert choose_attention("flash", CUDA, torch.bfloat16, AttentionNeeds(64)).name == "varlen"


def test_cudnn_is_not_given_windows() -> None:
    assert choose_attention("cudnn", CUDA, torch.bfloat16, AttentionNeeds(64)).name == "cudnn"
    with pytest.raises(UserError, match="cudnn can't run: the model's attention has sliding windows"):
        choose_attention("cudnn", CUDA, torch.bfloat16, AttentionNeeds(64, windows=True))


def test_what_a_model_needs_comes_before_what_is_fast() -> None:
    capped, own = AttentionNeeds(64, scores="scores are capped"), AttentionNeeds(64, own="code of its own")
    assert choose_attention("auto", CUDA, torch.bfloat16, capped).name == "math"
    assert choose_attention("auto", CUDA, torch.bfloat16, own).name == "model"
    for needs, reason in ((capped, "scores are capped"), (own, "code of its own")):
        assert reason in choose_attention("auto", CUDA, torch.bfloat16, needs).reason
        with pytest.raises(UserError, match=f"engine.attention: flash can't run: {reason}; use auto"):
            choose_attention("flash", CUDA, torch.bfloat16, needs)


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_a_kernel_asked_for_that_cannot_run_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"engine.attention: {name}"):
        choose_attention(name, CPU, torch.bfloat16, AttentionNeeds(64))


@pytest.mark.parametrize("value_width", [8, 5])  # DeepSeek's values are narrower than its keys
def test_varlen_arguments_are_those_of_the_installed_torch(monkeypatch: pytest.MonkeyPatch, value_width: int) -> None:
    """Without a CUDA device: torch's function is replaced by one that computes the same from the same arguments."""
    import torch.nn.attention.varlen as varlen

    real = varlen.varlen_attn

    def fake(*arguments: torch.Tensor, **keywords: object) -> torch.Tensor:
        import inspect

        bound = SimpleNamespace(**inspect.signature(real).bind(*arguments, **keywords).arguments)
        assert bound.window_size == (-1, 0) and bound.enable_gqa and bound.cu_seq_q.dtype == torch.int32
        assert bound.query.shape[-1] == bound.key.shape[-1] == bound.value.shape[-1] == 8
        assert bound.cu_seq_q is bound.cu_seq_k and bound.max_q == 64
        lengths = bound.cu_seq_q.diff().tolist()
        outputs = []
        for q, k, v in zip(*(part.split(lengths) for part in (bound.query, bound.key, bound.value)), strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            output = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=bound.scale, enable_gqa=True
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", fake)
    _, _, position_ids = packed_rows(LENGTHS)
    tensors = states(value_width=value_width)
    torch.testing.assert_close(run("varlen", tensors, position_ids, None), run("cpu", tensors, position_ids, None))


def test_caps_and_sinks_are_in_every_score() -> None:
    lengths, window, cap = [[40, 24]], 9, 2.0
    _, _, position_ids = packed_rows(lengths)
    query, key, value = (tensor[:1] for tensor in states())
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    documents = pack_documents(position_ids, AttentionChoice("math", "test"))
    output, _ = attend(
        nn.Identity(), query, key, value, WindowMask(window), softcap=cap, s_aux=sinks, documents=documents
    )
    for place, head in ((0, 0), (39, 1), (40, 2), (63, 3)):
        first = max(place - window + 1, 0 if place < 40 else 40)
        scores = key[0, head // 2, first : place + 1] @ query[0, head, place] * 8**-0.5
        scores = torch.cat([cap * torch.tanh(scores / cap), sinks[head : head + 1]])
        expected = torch.softmax(scores, 0)[:-1] @ value[0, head // 2, first : place + 1]
        torch.testing.assert_close(output[0, place, head], expected)
    output.square().sum().backward()
    assert sinks.grad is not None and sinks.grad.abs().min() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("lengths", [LENGTHS, [[64], [64], [64]], [[1] * 64, [63, 1], [2, 62]]])
def test_flash_attention_is_within_its_rounding_of_the_exact_result(
    lengths: list[list[int]], window: int | None
) -> None:
    _, _, position_ids = packed_rows(lengths)
    theirs = states(torch.bfloat16)
    ours = [tensor.detach().to(CUDA).requires_grad_() for tensor in theirs]
    output = run("varlen", ours, position_ids.to(CUDA), window)
    expected = oracle(*theirs, position_ids, window or 64)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=2**-6, atol=2**-6)
    upstream = torch.randn(output.shape)
    output.backward(upstream.to(CUDA, torch.bfloat16))
    expected.backward(upstream.double())
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad.cpu(), reference.grad, rtol=2**-5, atol=2**-4)
