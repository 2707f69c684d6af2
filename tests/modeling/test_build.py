import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llamapro.errors import Corrupted, ModelRefused
from llamapro.expansion.record import ExpansionRecord, Trained
from llamapro.files.tensors import TensorFolder
from llamapro.modeling.build import build_model
from llamapro.modeling.trainable import TrainableSet
from tests.support.families import TINY_FAMILIES, VOCABULARY
from tests.support.modeling import CPU, expanded_llama, packed_rows, plain_model, ready_model
from tests.support.models import save_tiny_llama

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What would differ at each call in training mode; PhiMoE chooses its experts by chance without being told to.
NOISE: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3, "layerdrop": 0.5},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.3},
    "phimoe": {},
}
ROPES = {
    "default": None,
    "llama3": LLAMA3_ROPE,
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert callable(change)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def flip_byte(folder: Path, name: str) -> None:
    entry = TensorFolder.open(folder).entries[name]
    content = bytearray(entry.file.read_bytes())
    content[entry.start + entry.nbytes // 2] ^= 1
    entry.file.write_bytes(content)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_buffers_equal_plain_transformers_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    folder = save_tiny_llama(tmp_path, tied=tied, max_shard_size="20KB")
    ours, plain = ready_model(folder, TrainableSet.of([1]), dtype).hf, plain_model(folder, dtype)
    for mine, theirs in (
        (ours.named_parameters(remove_duplicate=False), plain.named_parameters(remove_duplicate=False)),
        (ours.named_buffers(), plain.named_buffers()),
    ):
        left, right = dict(mine), dict(theirs)
        assert list(left) == list(right)
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_frequencies_are_float32_and_equal_for_every_kind(tmp_path: Path, rope: str) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters=ROPES[rope],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    ours = ready_model(tmp_path, TrainableSet.of([]), torch.bfloat16).hf
    theirs = plain_model(tmp_path, torch.bfloat16)
    buffers = dict(ours.named_buffers())
    assert len(buffers) == 2
    for name, tensor in theirs.named_buffers():
        assert buffers[name].dtype == torch.float32 and torch.equal(buffers[name], tensor)
    assert ours.model.rotary_emb.attention_scaling == theirs.model.rotary_emb.attention_scaling


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    hf = ready_model(save_tiny_llama(tmp_path, tied=True), TrainableSet.all()).hf
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    assert len([name for name, _ in hf.named_parameters() if "embed" in name or "head" in name]) == 1


def test_a_stored_copy_of_the_tied_head_is_accepted_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, tied=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    hf = ready_model(folder, TrainableSet.of([])).hf
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    edit_weights(folder, lambda t: t["lm_head.weight"][3, 3].add_(1))
    with pytest.raises(ModelRefused, match="must equal"):
        ready_model(folder, TrainableSet.of([]))


def test_requires_grad_is_set_before_any_parameter_is_partitioned(tmp_path: Path) -> None:
    seen: dict[str, bool] = {}
    folder = save_tiny_llama(tmp_path, blocks=3, tied=True)

    def partition(module: nn.Module) -> None:
        for parameter in module.parameters():
            assert not parameter.is_meta
            seen[f"{id(parameter)}"] = parameter.requires_grad

    model = build_model(
        folder, dtype=torch.float32, device=CPU, trainable=TrainableSet.of([1]), record=None, when_filled=partition
    )
    assert seen == {f"{id(parameter)}": parameter.requires_grad for parameter in model.parameters()}
    assert sum(seen.values()) == 9


def test_no_more_than_one_block_is_whole_at_a_time(tmp_path: Path) -> None:
    """The callback stands for a partition: it frees what it is given."""
    folder = save_tiny_llama(tmp_path, blocks=6)
    units: list[int] = []
    alive: list[nn.Module] = []

    def partition(module: nn.Module) -> None:
        whole = [p for other in alive for p in other.parameters() if p.numel()]
        assert not whole
        units.append(sum(parameter.numel() for parameter in module.parameters()))
        for parameter in module.parameters():
            parameter.data = torch.empty(0)
        alive.append(module)

    build_model(
        folder, dtype=torch.float32, device=CPU, trainable=TrainableSet.of([1]), record=None, when_filled=partition
    )
    assert len(units) == 6 + 3  # blocks; embedding, norm, head
    assert sum(units) == sum(parameter.numel() for parameter in plain_model(folder).parameters())


def test_a_flipped_byte_in_a_base_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    trainable = TrainableSet.of(record.new_blocks)
    ready_model(folder, trainable, record=record)
    name = f"model.layers.{record.block_map[1]}.mlp.up_proj.weight"
    flip_byte(folder, name)
    with pytest.raises(Corrupted, match=name.replace(".", r"\.")):
        ready_model(folder, trainable, record=record)
    ready_model(folder, trainable)  # without a record nothing says what the bytes must be


@pytest.mark.parametrize("tensor", ["mlp.up_proj.weight", "mlp.down_proj.weight"])  # a copy, and zeros
def test_a_flipped_byte_in_a_fresh_new_block_is_refused_and_in_a_trained_one_unknown(
    tmp_path: Path, tensor: str
) -> None:
    folder, record = expanded_llama(tmp_path)
    flip_byte(folder, f"model.layers.{record.new_blocks[0]}.{tensor}")
    with pytest.raises(Corrupted, match=tensor):
        ready_model(folder, TrainableSet.of(record.new_blocks), record=record)
    trained = record.model_copy(update={"trained": Trained(blocks=record.new_blocks)})
    ready_model(folder, TrainableSet.of(record.new_blocks), record=trained)


def test_what_the_record_lists_as_trained_may_differ(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    block = record.block_map[0]
    changed = [f"model.layers.{block}.mlp.up_proj.weight", "model.norm.weight"]
    for name in changed:
        flip_byte(folder, name)
    trained = Trained(blocks=(block,), tensors=("model.norm.weight",))
    ready_model(folder, TrainableSet.all(), record=record.model_copy(update={"trained": trained}))
    with pytest.raises(Corrupted, match="norm"):
        partly = record.model_copy(update={"trained": Trained(blocks=(block,))})
        ready_model(folder, TrainableSet.all(), record=partly)


def test_processes_divide_the_digests_and_one_of_them_finds_the_fault_after_filling_everything(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path)
    flip_byte(folder, "model.norm.weight")
    found = []
    for rank in range(3):
        filled: list[nn.Module] = []
        try:
            build(folder, record, (rank, 3), filled)
        except Corrupted:
            found.append(rank)
        assert len(filled) == 6 + 3
    assert len(found) == 1


def build(folder: Path, record: ExpansionRecord, share: tuple[int, int], filled: list[nn.Module]) -> None:
    trainable = TrainableSet.of(record.new_blocks)
    build_model(
        folder,
        dtype=torch.float32,
        device=CPU,
        trainable=trainable,
        record=record,
        when_filled=filled.append,
        digest_share=share,
    )


def test_a_base_tensor_that_is_gone_is_refused(tmp_path: Path) -> None:
    folder, record = expanded_llama(tmp_path, tied=True)
    digest = record.base_tensors["model.norm.weight"]
    more = record.model_copy(update={"base_tensors": record.base_tensors | {"model.extra.weight": digest}})
    with pytest.raises(Corrupted, match="lacks model.extra.weight"):
        ready_model(folder, TrainableSet.of(record.new_blocks), record=more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"shape \[31\], the configuration says \[32\]"),
        (lambda t: t.update({"model.adapter.weight": torch.ones(3)}), "model.adapter.weight belongs to no parameter"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "only unquantized"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: object, message: str) -> None:
    folder = save_tiny_llama(tmp_path)
    edit_weights(folder, change)
    with pytest.raises(ModelRefused, match=message):
        ready_model(folder, TrainableSet.of([]))


def test_rotary_frequencies_stored_by_old_versions_are_left_aside(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda t: t.update({name: torch.full((4,), 7.0)}))
    ours = dict(ready_model(folder, TrainableSet.of([])).hf.named_buffers())
    for name, tensor in plain_model(folder).named_buffers():
        assert torch.equal(ours[name], tensor)


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, dtype=torch.bfloat16)
    model = ready_model(folder, TrainableSet.of([1]), torch.float32)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.hf.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, stored[name].float())
    rows = packed_rows([[64]])
    assert model(*rows).loss_sum.dtype == torch.float32


def test_dropout_is_switched_off_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_llama(tmp_path)
    edit_config(folder, attention_dropout=0.25)
    model = ready_model(folder, TrainableSet.of([1])).train()
    assert "attention_dropout 0.25 is ignored" in capsys.readouterr().err
    rows = packed_rows([[64]])
    assert torch.equal(model(*rows).loss_sum, model(*rows).loss_sum)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "no_such_model"}, "model_type 'no_such_model'"),
    ],
)
def test_configurations_that_would_compute_something_else_are_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    folder = save_tiny_llama(tmp_path)
    edit_config(folder, **values)
    with pytest.raises(ModelRefused, match=message):
        ready_model(folder, TrainableSet.of([]))


@pytest.mark.parametrize(("model_type", "fields"), NOISE.items(), ids=NOISE)
def test_nothing_is_left_to_chance_in_any_family(
    tmp_path: Path, model_type: str, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = [row for row in TINY_FAMILIES if row.name == model_type]
    row.save(tmp_path, **fields)
    model = ready_model(tmp_path, TrainableSet.of([1])).train()
    rows = packed_rows([[24]], ids=range(VOCABULARY))
    assert len({model(*rows).loss_sum.item() for _ in range(5)}) == 1
    said = capsys.readouterr().err
    assert all(f"{name} {value} is ignored" in said for name, value in fields.items() if "drop" in name)


def test_outputs_that_a_configuration_asks_for_besides_are_not_made(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    rows = packed_rows([[64]])
    expected = ready_model(folder, TrainableSet.of([1]))(*rows).loss_sum
    edit_config(folder, return_dict=False, output_hidden_states=True, output_attentions=True)
    assert torch.equal(ready_model(folder, TrainableSet.of([1]))(*rows).loss_sum, expected)


def test_building_and_a_training_step_do_not_import_deepspeed(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    program = (
        "import sys; from pathlib import Path; import torch\n"
        "from llamapro.modeling.build import build_model\n"
        "from llamapro.modeling.trainable import TrainableSet\n"
        "model = build_model(Path(sys.argv[1]), dtype=torch.float32, device=torch.device('cpu'),\n"
        "                    trainable=TrainableSet.of([1]), record=None)\n"
        "ids = torch.arange(8)[None]\n"
        "model(ids, ids, ids).loss_sum.backward()\n"
        "sys.exit(sum(name.split('.')[0] == 'deepspeed' for name in sys.modules))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(folder)], check=False).returncode == 0
