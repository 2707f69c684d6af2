"""The model families that can be expanded, as one table; everything else is refused by name.

To add a family, append a `Family` to `FAMILIES`: which tensors of a block write to the residual stream (they become
zero in a copy, so that the copy is the identity), which config fields hold one entry per block, and which config
fields make its function depend on depth. Then add a row to the families of `tests/expansion/test_families.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamapro.errors import ModelRefused


@dataclass(frozen=True)
class Family:
    """One row: models whose blocks have the same tensors and the same zero rule.

    Attributes:
        model_types: values of `model_type` in config.json.
        architectures: the causal language models of the family; other heads are refused.
        decoder_prefix: what a block's tensor names begin with, before the block index.
        zeroed: tensors of a block, without prefix and index, that every block has and that become zero in a copy.
        zeroed_if_present: the same for tensors that some configurations don't have.
        per_layer_fields: config fields that are lists with one entry per block, expanded with the blocks.
        refusals: config fields, as (name, reason), that must be absent, null, false or empty.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    decoder_prefix: str
    zeroed: tuple[str, ...]
    zeroed_if_present: tuple[str, ...] = ()
    per_layer_fields: tuple[str, ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()


FAMILIES = (
    Family(
        name="llama",
        model_types=("llama", "mistral"),
        architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        decoder_prefix="model.layers.",
        # Pre-norm: x + o_proj(attention(norm(x))), then x + down_proj(mlp(norm(x))).
        zeroed=("self_attn.o_proj.weight", "mlp.down_proj.weight"),
        zeroed_if_present=("self_attn.o_proj.bias", "mlp.down_proj.bias"),
        per_layer_fields=("layer_types",),
    ),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model, by its `model_type`.

    Raises:
        ModelRefused: no family has this model type, or this configuration of it can't be expanded; says why.
    """
    model_type = config.get("model_type")
    family = next((row for row in FAMILIES if model_type in row.model_types), None)
    if family is None:
        raise ModelRefused(
            f"model_type {model_type!r} can't be expanded: nobody has declared here which tensors of its blocks write "
            f"to the residual stream, and a copy with the wrong ones zeroed would change the model; supported: "
            f"{', '.join(supported_model_types())}"
        )
    _check_config(family, config)
    return family


def family_named(name: str) -> Family:
    """The family that a record names.

    Raises:
        ModelRefused: this version does not have it.
    """
    family = next((row for row in FAMILIES if row.name == name), None)
    if family is None:
        known = ", ".join(row.name for row in FAMILIES)
        raise ModelRefused(f"the record names the family {name!r}; this version knows {known}")
    return family


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be expanded."""
    return tuple(sorted(model_type for row in FAMILIES for model_type in row.model_types))


def parse_block_index(family: Family, tensor_name: str) -> int | None:
    """The block that a tensor belongs to; None for embedding, final norm and head."""
    parsed = split_block_name(family, tensor_name)
    return None if parsed is None else parsed[0]


def split_block_name(family: Family, tensor_name: str) -> tuple[int, str] | None:
    """A tensor name of a block, divided: "model.layers.12.mlp.up_proj.weight" → (12, "mlp.up_proj.weight")."""
    match = re.fullmatch(re.escape(family.decoder_prefix) + r"(0|[1-9]\d*)\.(.+)", tensor_name, flags=re.ASCII)
    return None if match is None else (int(match[1]), match[2])


def block_tensor_name(family: Family, block: int, rest: str) -> str:
    """The inverse of `split_block_name`."""
    return f"{family.decoder_prefix}{block}.{rest}"


def is_zeroed(family: Family, rest: str) -> bool:
    """Whether the zero rule covers a block's tensor, given its name without prefix and index."""
    return rest in family.zeroed or rest in family.zeroed_if_present


def _check_config(family: Family, config: Mapping[str, Any]) -> None:
    model_type = config["model_type"]
    architectures = config.get("architectures") or []
    if wrong := [name for name in architectures if name not in family.architectures]:
        raise ModelRefused(
            f"architecture {wrong[0]} can't be expanded; model_type {model_type!r} is supported as "
            f"{' or '.join(family.architectures)}"
        )
    for field, reason in family.refusals:
        if config.get(field):
            raise ModelRefused(f"{model_type} with {field}: {config[field]!r} can't be expanded: {reason}")
