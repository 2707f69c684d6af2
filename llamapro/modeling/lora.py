"""Low-rank adapters by peft: put beside linears that stay frozen, drawn from the run's seed, merged into their weights.

What LoRA computes is peft's alone. Here is which linears get adapters, how their tensors are called in a checkpoint,
and that every rank draws the same values. A linear moves to `base_layer` below its own name; `StoredParts` is told so,
and all that goes by stored tensors (proofs, checkpoints, exports) knows no difference.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llamapro.errors import ModelRefused, UserError
from llamapro.modeling.linear import is_plain_linear
from llamapro.modeling.stored_parts import Part, StoredParts
from llamapro.modeling.trainable import Adapters, TrainableSet

# peft's name for the one adapter that a linear has here.
_NAME = "default"
_WEIGHT, _BIAS = ".weight", ".bias"
_MATRICES = ("lora_A", "lora_B")


class AdapterTensors(NamedTuple):
    """The names in a checkpoint of an adapter's matrices: A (rank, in_features), B (out_features, rank)."""

    a: str
    b: str


def require_peft() -> None:
    """Check that adapters can be made.

    Raises:
        UserError: peft is missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"LoRA needs peft ({error}): pip install 'llamapro[lora]'") from error


def adapter_targets(hf: PreTrainedModel, decoder_prefix: str, blocks: Iterable[int]) -> dict[str, nn.Module]:
    """The linears of some blocks of a plain transformers model, by name.

    Raises:
        ModelRefused: a block holds matrices that are no plain linears, beside which there would be no adapter.
    """
    targets: dict[str, nn.Module] = {}
    for index in sorted(blocks):
        place = f"{decoder_prefix}{index}"
        for name, module in hf.get_submodule(place).named_modules(prefix=place):
            if is_plain_linear(module):
                targets[name] = module
            elif other := _matrix_of(module):
                raise ModelRefused(
                    f"lora puts adapters beside plain linears, and in block {index} of {type(hf).__name__} "
                    f"{name}.{other} belongs to none ({type(module).__name__}); train whole blocks: new, all, or a "
                    "list of block ids"
                )
    return targets


def holds_transposed(targets: Mapping[str, nn.Module]) -> bool:
    """Whether these linears hold their matrices as (in_features, out_features), as GPT-2 does."""
    (transposed,) = {isinstance(module, Conv1D) for module in targets.values()}
    return transposed


def adapter_tensors(names: Iterable[str]) -> dict[str, AdapterTensors]:
    """Of all tensors of a checkpoint the adapters', by the weight in the model folder that they are beside."""
    suffix = f".{_MATRICES[0]}{_WEIGHT}"
    stems = sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return {stem + _WEIGHT: _tensors_of(stem) for stem in stems}


def add_adapters(
    hf: PreTrainedModel, targets: Mapping[str, nn.Module], trainable: TrainableSet, stored: StoredParts
) -> StoredParts:
    """Put adapters, on the meta device, beside linears of a model whose weights are still to be read.

    Args:
        stored: the stored tensors of the model's parameters.

    Returns:
        The same under the linears' new names, with the adapters' own tensors.

    Raises:
        ModelRefused: a linear's weight is no stored tensor of its own, so an adapter's matrices have no names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    adapters = trainable.adapters
    assert adapters is not None
    stems = {target: _stem(target, stored.of(target + _WEIGHT)) for target in targets}
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]
        target_modules=list(targets),
        fan_in_fan_out=adapters.transposed,
    )
    inject_adapter_in_model(config, hf, _NAME, low_cpu_mem_usage=True)
    assert set(_layers(hf)) == set(targets), "peft has put adapters elsewhere"
    moved = {f"{target}{kind}": f"{target}.base_layer{kind}" for target in targets for kind in (_WEIGHT, _BIAS)}
    added = {
        f"{target}.{matrix}.{_NAME}{_WEIGHT}": (Part(name, tuple(getattr(layer, matrix)[_NAME].weight.shape), 0),)
        for target, layer in _layers(hf).items()
        for matrix, name in zip(_MATRICES, _tensors_of(stems[target]), strict=True)
    }
    return stored.rearranged(moved, added)


def drawing(hf: PreTrainedModel, seed: int, dtype: torch.dtype, device: torch.device) -> Callable[[nn.Module], None]:
    """What makes the adapters below a module real, with the values that peft begins with: B is zero.

    They depend on the seed and the linear's name alone, so every rank and every device draws the same.
    """
    names = {id(layer): name for name, layer in _layers(hf).items()}

    def draw(module: nn.Module) -> None:
        for layer in module.modules():
            if id(layer) in names:
                _draw(layer, f"{seed}/{names[id(layer)]}", dtype, device)

    return draw


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    """A linear's weight with its adapter in it, as peft merges them; the weight's own memory is used.

    Args:
        weight: float32, (out_features, in_features), or the other way round where `adapters.transposed`.
        a, b: float32, (rank, in_features) and (out_features, rank).
    """
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    with torch.device("meta"):
        inside, outside = a.shape[1], b.shape[0]
        base = Conv1D(outside, inside) if adapters.transposed else nn.Linear(inside, outside, bias=False)  # type: ignore[no-untyped-call]
        config = LoraConfig(fan_in_fan_out=adapters.transposed)
        layer = Linear(base, _NAME, config, adapters.rank, adapters.alpha)  # type: ignore[arg-type]
    base.weight = nn.Parameter(weight, requires_grad=False)
    for matrix, values in zip(_MATRICES, (a, b), strict=True):
        getattr(layer, matrix)[_NAME].weight = nn.Parameter(values, requires_grad=False)
    layer.merge()
    return base.weight.detach()


def _matrix_of(module: nn.Module) -> str:
    """The name of a matrix that a module itself owns; empty when it has none. Norms of heads have a row for each."""
    if "norm" in type(module).__name__.lower():
        return ""
    owned = (name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim > 1)
    return next(owned, "")


def _layers(hf: nn.Module) -> dict[str, nn.Module]:
    """The linears with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in hf.named_modules() if isinstance(module, LoraLayer)}  # type: ignore[misc]


def _tensors_of(stem: str) -> AdapterTensors:
    return AdapterTensors(*(f"{stem}.{matrix}{_WEIGHT}" for matrix in _MATRICES))


def _stem(target: str, parts: Sequence[Part]) -> str:
    """A linear's name in the model folder."""
    if len(parts) > 1 or not parts[0].name.endswith(_WEIGHT):
        made_of = ", ".join(part.name for part in parts[:3])
        raise ModelRefused(f"lora: {target} is no linear of its own in the model folder, but made of {made_of}")
    return parts[0].name.removesuffix(_WEIGHT)


def _draw(layer: nn.Module, named: str, dtype: torch.dtype, device: torch.device) -> None:
    """In float32 on the CPU, whatever the model is in."""
    matrices = [getattr(layer, matrix) for matrix in _MATRICES]
    for each in matrices:
        each.to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(xxhash.xxh3_64_intdigest(named.encode()) & (2**63 - 1))
        layer.reset_lora_parameters(_NAME, init_lora_weights=True)  # type: ignore[operator]
    for each in matrices:
        each.to(device=device, dtype=dtype)
