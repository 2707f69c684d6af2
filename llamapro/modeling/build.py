"""From a model folder to a `LanguageModel` whose every parameter and buffer equals plain transformers', bit for bit.

The order matters: build on the meta device, make buffers real, replace parts, mark what learns, then fill and partition
module by module. Built under DeepSpeed's `zero.Init` or transformers' own DeepSpeed hook instead, the rotary
frequencies become bf16 at stage 3, and the model no longer computes what its base computes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llamapro.console import warning
from llamapro.errors import ModelRefused
from llamapro.expansion.record import ExpansionRecord
from llamapro.expansion.source import read_config
from llamapro.files.tensors import TensorFolder
from llamapro.modeling.attention import choose_attention, register_attention
from llamapro.modeling.blocks import prepare_blocks
from llamapro.modeling.loss import make_loss_head
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.trainable import TrainableSet, mark_trainable
from llamapro.modeling.weights import expected_digests, open_weights, partitioned_fill

# Between the head and the logits some families put a scale or a soft cap; the loss here has neither.
LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def build_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trainable: TrainableSet,
    record: ExpansionRecord | None,
    attention: str = "auto",
    partition: Callable[[nn.Module], None] | None = None,
    digest_share: tuple[int, int] = (0, 1),
) -> LanguageModel:
    """Build a model for training or evaluation. No code in the folder is run.

    Args:
        folder: config.json and safetensors.
        dtype: of parameters and activations; weights stored in another one are cast.
        record: the folder's expansion record: base tensors that it doesn't list as trained must have its digests.
        attention: `engine.attention` of the run configuration.
        partition: called with each module as soon as it is filled: every decoder block, and every other module that
            owns parameters. Afterwards the module may hold only this rank's share. It may be collective.
        digest_share: (rank, world size): which of the digests this process checks.

    Raises:
        ModelRefused: the folder can't be trained as it is; says why. The same on every rank.
        UserError: the attention kernel asked for can't run here. The same on every rank.
        Corrupted: a base tensor differs from its digest; names it. Raised only when everything is filled and
            partitioned, so ranks stay in step up to here and can agree on it afterwards.
    """
    config = _load_config(folder)
    hf = _on_meta(config)
    _make_buffers_real(hf, device)
    blocks, decoder_prefix = _decoder_blocks(hf)
    choice = choose_attention(attention, device, dtype, _head_dim(config))
    mark_trainable(hf, trainable, decoder_prefix)
    prepare_blocks(blocks, trainable)
    make_loss_head(_plain_head(hf))
    expected = {} if record is None else expected_digests(record, digest_share)
    reader = open_weights(hf, TensorFolder.open(folder), dtype, device, expected)
    config.dtype = dtype
    partitioned_fill(hf, blocks, reader, partition)
    reader.check_rest()
    return LanguageModel(hf, decoder_prefix, trainable, choice)


def _load_config(folder: Path) -> PretrainedConfig:
    read_config(folder)  # refuses folders that select code to run, and quantized ones
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelRefused(f"{folder / 'config.json'} is not understood by transformers: {error}") from error
    values = config.to_dict()
    for name in LOGIT_FIELDS:
        if values.get(name) not in (None, 1.0):
            raise ModelRefused(f"{folder}: {name} {values[name]} changes the logits, which the loss doesn't know")
    for name, value in values.items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0:
            warning(f"{folder / 'config.json'}: {name} {value} is set to 0: frozen blocks must compute the same always")
            setattr(config, name, 0.0)
    return config


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    hooked = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    assert not hooked, "transformers' own DeepSpeed hook must not be active"
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False, attn_implementation=register_attention()
        )
    assert isinstance(hf, PreTrainedModel)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in hf.modules()):
        raise ModelRefused(f"{type(hf).__name__} has dropout that its configuration can't switch off")
    return hf


def _make_buffers_real(hf: PreTrainedModel, device: torch.device) -> None:
    """Compute every buffer as transformers does when it loads a model: in float32, on the CPU."""
    for name, module in hf.named_modules():
        buffers = _own_buffers(module)
        if not buffers:
            continue
        for key, buffer in buffers.items():
            module._buffers[key] = (
                torch.full_like(buffer, torch.nan, device="cpu") if buffer.is_floating_point() else None
            )
        with torch.no_grad():
            hf._init_weights(module)  # type: ignore[no-untyped-call]
        for key in buffers:
            value = module._buffers[key]
            if value is None or value.isnan().any():
                raise ModelRefused(f"{type(hf).__name__}: transformers doesn't say how to compute {name}.{key}")
            module._buffers[key] = value.to(device)


def _own_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: buffer for key, buffer in module._buffers.items() if buffer is not None}


def _decoder_blocks(hf: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The decoder's list of blocks, and its name with a closing dot."""
    count = hf.config.num_hidden_layers
    found = [(module, f"{name}.") for name, module in _module_lists(hf) if len(module) == count]
    if len(found) != 1:
        raise ModelRefused(f"{type(hf).__name__} has {len(found)} lists of {count} blocks; exactly one is understood")
    return found[0]


def _module_lists(hf: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in hf.named_modules():
        if isinstance(module, nn.ModuleList):
            yield name, module


def _plain_head(hf: PreTrainedModel) -> nn.Linear:
    head = hf.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        raise ModelRefused(f"{type(hf).__name__}: the head is {type(head).__name__}, only a plain linear is understood")
    return head


def _head_dim(config: PretrainedConfig) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
