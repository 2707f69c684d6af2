"""A model's sizes from its config.json, for every family: transformers builds the model without weights.

Nothing of a family is known here, so nothing can be wrong for one; it takes a second or two, and no memory to speak of.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from llamapro.errors import ModelRefused
from llamapro.expansion.families import Family, family_of
from llamapro.expansion.family import NormStyle
from llamapro.expansion.kinds import one_line, quiet_transformers
from llamapro.planning.shape import BlockSize, DecoderShape

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from llamapro.planning.kept import KeptByKind

# The names under which configurations keep the number of experts, and how many of them a token goes to.
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN: Final = ("num_experts_per_tok", "moe_topk", "moe_top_k")


def measure(config: Mapping[str, Any]) -> DecoderShape:
    """The sizes of the model of a config.json.

    Raises:
        ModelRefused: transformers can't build it, or no family says where its blocks are.
    """
    family = family_of(config)
    model = _without_weights(config)
    decoder = family.decoder_prefix.removesuffix(".")
    kept = _kept_by_blocks(model, decoder)
    sizes = tuple(
        replace(_block_size(model.config, block, index), kept=kept[index], **_ending(family, block))
        for index, block in enumerate(model.get_submodule(decoder).children())
    )
    everything = sum(parameter.numel() for parameter in model.parameters())
    return DecoderShape(
        hidden=model.config.hidden_size,
        **_heads(model.config),
        vocabulary=model.config.vocab_size,
        block_sizes=sizes,
        other_parameters=everything - sum(size.parameters for size in sizes),
        scores_kept=not model._supports_sdpa,
    )


def _without_weights(config: Mapping[str, Any]) -> "PreTrainedModel":
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, trust_remote_code=False
            )
    except Exception as error:  # whatever a config class or a model's constructor raises about this configuration
        raise ModelRefused(f"transformers can't build the model of this config.json: {one_line(error)}") from error
    return model


def _kept_by_blocks(model: "PreTrainedModel", decoder: str) -> "Sequence[KeptByKind]":
    """What each block keeps; nothing for each where that can't be seen."""
    from llamapro.planning.kept import kept_by_blocks

    own_attention = not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    with quiet_transformers():
        kept = kept_by_blocks(model.config, decoder, own_attention=own_attention)
    return [{} for _ in model.get_submodule(decoder).children()] if kept is None else kept


def _heads(config: "PretrainedConfig") -> dict[str, int]:
    heads = config.num_attention_heads
    shared = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    key_value_heads = 1 if shared else _first(config, ("num_key_value_heads", "num_kv_heads")) or heads
    key_dim = _first(config, ("qk_head_dim", "head_dim")) or config.hidden_size // heads
    return {
        "heads": heads,
        "key_value_heads": min(key_value_heads, heads),
        "key_dim": key_dim,
        "value_dim": _first(config, ("v_head_dim",)) or key_dim,
    }


def _block_size(config: "PretrainedConfig", block: "nn.Module", index: int) -> BlockSize:
    from llamapro.planning.fp8_weights import saved_bytes

    share = _chosen_share(config, index)
    matrices = sum(
        round(parameter.numel() * share) if _is_routed(name, parameter) else parameter.numel()
        for name, parameter in block.named_parameters()
        if parameter.ndim > 1 and not name.endswith("bias")
    )
    parameters = sum(parameter.numel() for parameter in block.parameters())
    widths = _linear_widths(block)
    return BlockSize(
        parameters,
        matrices,
        _window(config, index),
        fp8_saving=saved_bytes(block),
        linears=len(widths),
        linear_widths=sum(widths),
    )


def _linear_widths(block: "nn.Module") -> list[int]:
    """Inputs and outputs of each linear, together."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linears = (module for module in block.modules() if isinstance(module, nn.Linear | Conv1D))
    return [sum(linear.weight.shape) for linear in linears]


def _ending(family: Family, block: "nn.Module") -> dict[str, Any]:
    """Whether there are experts, and the weights of the linear that writes the last branch's result.

    0 where that result is needed: by a norm behind the branch, or for the shares of experts.
    """
    experts = any(_is_routed(name, parameter) for name, parameter in block.named_parameters())
    if experts or family.norm_style not in (NormStyle.PRE, NormStyle.PARALLEL):
        return {"experts": experts, "last_matrix": 0}
    modules = dict(block.named_modules())
    last = next((modules[name].weight.numel() for name in family.writers[-1] if name in modules), 0)
    return {"experts": False, "last_matrix": last}


def _is_routed(name: str, parameter: "nn.Parameter") -> bool:
    """Whether a parameter holds experts: in one tensor with the expert's number in front, or in a list of them."""
    return parameter.ndim == 3 or "experts" in name.split(".")


def _chosen_share(config: "PretrainedConfig", index: int) -> float:
    """Which share of a block's experts a token goes to; all of them where the configuration doesn't say."""
    for section in (config, *_nested(config)):
        experts, chosen = (_of_block(_first(section, names), index) for names in (_EXPERTS, _CHOSEN))
        if experts and chosen:
            return float(chosen / experts)
    return 1.0


def _window(config: "PretrainedConfig", index: int) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or kinds[index] == "sliding_attention" else None


def _of_block(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list | tuple) else value


def _nested(config: "PretrainedConfig") -> Iterator["PretrainedConfig"]:
    from transformers import PretrainedConfig

    yield from (value for value in vars(config).values() if isinstance(value, PretrainedConfig))


def _first(config: "PretrainedConfig", names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)
