"""From a model folder to a `LanguageModel` whose every parameter and buffer equals plain transformers', bit for bit.

The order matters: build on the meta device, make buffers real, replace parts, mark what learns, then fill and partition
module by module. Built under DeepSpeed's `zero.Init` or transformers' own DeepSpeed hook instead, the rotary
frequencies become bf16 at stage 3, and the model no longer computes what its base computes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llamapro.console import warning
from llamapro.errors import ModelRefused
from llamapro.expansion.families import family_of
from llamapro.expansion.record import ExpansionRecord
from llamapro.expansion.source import read_config
from llamapro.files.tensors import TensorFolder
from llamapro.modeling.attention import AttentionNeeds, choose_attention, register_attention
from llamapro.modeling.blocks import prepare_blocks
from llamapro.modeling.flash import activate
from llamapro.modeling.logits import head_steps
from llamapro.modeling.lora import adapter_targets, add_adapters, drawing
from llamapro.modeling.loss import make_loss_head
from llamapro.modeling.masks import DocumentMasks
from llamapro.modeling.model import LanguageModel
from llamapro.modeling.trainable import TrainableSet, mark_trainable
from llamapro.modeling.weights import expected_digests, fill_model, open_weights

# In names of config fields: what makes a model in training compute something else each time.
DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop")
# What a configuration may ask a forward pass to hand out besides the hidden states.
EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
# Their blocks call the attention interface without the arguments that the model was called with.
SILENT_MODEL_TYPES = ("nemotron", "stablelm")


def build_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trainable: TrainableSet,
    record: ExpansionRecord | None,
    attention: str = "auto",
    when_filled: Callable[[nn.Module], None] | None = None,
    digest_share: tuple[int, int] = (0, 1),
    seed: int = 0,
) -> LanguageModel:
    """Build a model for training or evaluation. No code in the folder is run.

    Args:
        folder: config.json and safetensors.
        dtype: of parameters and activations; weights stored in another one are cast.
        record: the folder's expansion record: base tensors that it doesn't list as trained must have its digests.
        attention: `engine.attention` of the run configuration.
        when_filled: called with each module as soon as it has its weights: every decoder block, and every other module
            that owns parameters. Afterwards the module may hold only this rank's share, or codes of its weights. It
            may be collective.
        digest_share: (rank, world size): which of the digests this process checks.
        seed: of the first values of adapters.

    Raises:
        ModelRefused: the folder can't be trained as it is; says why. The same on every rank.
        UserError: the attention kernel asked for can't run here. The same on every rank.
        Corrupted: a base tensor differs from its digest; names it. Raised only when everything is filled and
            partitioned, so ranks stay in step up to here and can agree on it afterwards.
    """
    config, decoder_prefix = _load_config(folder)
    hf = _on_meta(config)
    blocks = _decoder_blocks(hf, decoder_prefix)
    tensors = TensorFolder.open(folder)
    _make_buffers_real(hf, tensors, device)
    choice = choose_attention(attention, device, dtype, _attention_needs(hf))
    if choice.flash is not None:
        activate(choice.flash)
    mark_trainable(hf, trainable, decoder_prefix)
    masks = DocumentMasks(blocks) if own_attention(config) else None
    targets = adapter_targets(hf, decoder_prefix, trainable.blocks) if trainable.adapters else {}
    prepare_blocks(blocks, trainable)
    make_loss_head(_plain_head(hf), head_steps(config))
    expected = {} if record is None else expected_digests(record, digest_share)
    reader = open_weights(hf, tensors, dtype, device, expected)
    config.dtype = dtype
    stored = reader.stored
    if targets:
        stored = add_adapters(hf, targets, trainable, stored)
        when_filled = _in_turn(drawing(hf, seed, dtype, device), when_filled)
    fill_model(hf, blocks, reader, when_filled)
    reader.check_rest()
    return LanguageModel(hf, decoder_prefix, trainable, choice, masks, stored)


def _in_turn(first: Callable[[nn.Module], None], then: Callable[[nn.Module], None] | None) -> Callable[..., None]:
    """Both, one after the other."""

    def both(module: nn.Module) -> None:
        first(module)
        if then is not None:
            then(module)

    return both


def own_attention(config: PretrainedConfig) -> str:
    """Why a model's attention can't be a kernel of ours; empty when it can."""
    model_class: type = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
    if not hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return f"{model_class.__name__} doesn't call transformers' attention interface"
    if config.model_type in SILENT_MODEL_TYPES:
        return f"the blocks of {model_class.__name__} don't tell their attention where documents lie"
    return ""


def _load_config(folder: Path) -> tuple[PretrainedConfig, str]:
    """The configuration, and the name of the decoder's list of blocks with a closing dot."""
    family = family_of(read_config(folder))  # refuses folders that select code to run, and quantized ones
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelRefused(f"{folder / 'config.json'} is not understood by transformers: {error}") from error
    config.return_dict = True
    for name in EXTRA_OUTPUTS:
        if getattr(config, name, False):
            setattr(config, name, False)
    say_ignored_dropout(config, str(folder / "config.json"))
    return config, family.decoder_prefix


def say_ignored_dropout(config: PretrainedConfig, source: str) -> None:
    """Warn of every dropout in a configuration and in those nested in it: `LanguageModel` never applies any."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            say_ignored_dropout(value, f"{source}: {name}")
        elif any(word in name for word in DROPOUT_WORDS) and isinstance(value, float) and value > 0:
            warning(f"{source}: {name} {value} is ignored: frozen blocks must compute the same always")


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    hooked = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    assert not hooked, "transformers' own DeepSpeed hook must not be active"
    attention: dict[str, Any] = {} if own_attention(config) else {"attn_implementation": register_attention()}
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **attention)  # type: ignore[no-untyped-call]
    assert isinstance(hf, PreTrainedModel)
    return hf


def _make_buffers_real(hf: PreTrainedModel, tensors: TensorFolder, device: torch.device) -> None:
    """Compute every buffer that isn't stored as transformers does when it loads a model: in float32, on the CPU."""
    for name, module in hf.named_modules():
        prefix = f"{name}." if name else ""
        stored = {key: buffer for key, buffer in module._buffers.items() if prefix + key in tensors.entries}
        stored = {key: buffer for key, buffer in stored.items() if key not in module._non_persistent_buffers_set}
        if all(buffer is None or key in stored for key, buffer in module._buffers.items()):
            continue
        zeros, ones = (_initialised(hf, module, fill) for fill in (torch.zeros_like, torch.ones_like))
        for key in zeros.keys() - stored.keys():
            if not torch.equal(zeros[key], ones[key]):  # what was there before is there still
                raise ModelRefused(f"{type(hf).__name__}: transformers doesn't say how to compute {prefix}{key}")
            module._buffers[key] = zeros[key].to(device)
        module._buffers.update(stored)


def _initialised(hf: PreTrainedModel, module: nn.Module, fill: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's buffers after transformers has initialised them, if they were filled with this before."""
    for key, buffer in module._buffers.items():
        module._buffers[key] = None if buffer is None else fill(buffer, device="cpu")
    with torch.no_grad():
        hf._init_weights(module)  # type: ignore[no-untyped-call]
    return {key: buffer for key, buffer in module._buffers.items() if buffer is not None}


def _decoder_blocks(hf: PreTrainedModel, decoder_prefix: str) -> nn.ModuleList:
    """The decoder's list of blocks.

    Raises:
        ModelRefused: blocks carry something from one document to the next.
    """
    blocks = hf.get_submodule(decoder_prefix.removesuffix("."))
    assert isinstance(blocks, nn.ModuleList)
    for index, block in enumerate(blocks):
        # Causal convolutions stand in state-space and linear-attention layers too.
        if mixing := [name for name, module in block.named_modules() if isinstance(module, nn.Conv1d)]:
            raise ModelRefused(
                f"{type(hf).__name__} can be expanded, but not trained here: rows hold several documents, and block "
                f"{index} carries a state from each document to the next ({mixing[0]})"
            )
    return blocks


def _plain_head(hf: PreTrainedModel) -> nn.Linear:
    head = hf.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        raise ModelRefused(f"{type(hf).__name__}: the head is {type(head).__name__}, only a plain linear is understood")
    return head


def _attention_needs(hf: PreTrainedModel) -> AttentionNeeds:
    config = hf.config
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelRefused(f"{type(hf).__name__} attends in chunks, which isn't computed here")
    head_dim = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    scores = ""
    if cap := getattr(config, "attn_logit_softcapping", None):
        scores = f"{type(hf).__name__} caps scores at {cap}"
    elif any(name.endswith(".sinks") for name, _ in hf.named_parameters()):
        scores = f"{type(hf).__name__} has attention sinks"
    return AttentionNeeds(
        head_dim=int(head_dim or config.hidden_size // config.num_attention_heads),
        own=own_attention(config),
        scores=scores,
        windows=bool(getattr(config, "sliding_window", None)),
    )
