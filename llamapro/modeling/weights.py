"""Weights from a model folder into a model on the meta device, module by module, each base tensor proved on the way.

A module's parameters come to exist when it is filled, so with a callback that cuts or quantizes it no more than one
block is ever whole in memory. Shared parameters (tied embeddings) are read once and stay one parameter.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel

from llamapro.errors import Corrupted, ModelRefused
from llamapro.expansion.families import Family, family_named, zeroed_value
from llamapro.expansion.lineage import is_trained
from llamapro.expansion.record import ExpansionRecord, TensorDigest
from llamapro.expansion.verify import expected_tensors
from llamapro.expansion.zero_rule import filled_chunks
from llamapro.files.tensors import DTYPE_BYTES, FLOAT_DTYPES, TensorFolder
from llamapro.modeling.stored_parts import Assembly, Part, StoredParts, assemblies

# Rotary frequencies, stored by old versions of transformers; they are computed from the configuration instead.
COMPUTED_SUFFIX = "rotary_emb.inv_freq"
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """What a parameter or buffer is read from, and the dtype it is held in."""

    assembly: Assembly
    dtype: torch.dtype


@dataclass
class WeightReader:
    """Fills modules from a folder.

    Attributes:
        stored: the stored tensors of every parameter, and of every buffer that is stored.
        expected: SHA-256 of the tensors that this process checks while reading, by name.
        different: names of tensors whose bytes differ from `expected`.
    """

    folder: TensorFolder
    device: torch.device
    expected: Mapping[str, str]
    stored: StoredParts
    sources: Mapping[int, Source]
    different: list[str] = field(default_factory=list)
    _filled: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def fill(self, module: nn.Module) -> None:
        """Make a module, and all below it, real: parameters and buffers that are stored. Adapters are not."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta and id(parameter) in self.sources:
                    owner._parameters[name] = self._real(parameter)
            for name, buffer in owner._buffers.items():
                if buffer is not None and id(buffer) in self.sources:
                    owner._buffers[name] = self._read(self.sources[id(buffer)])

    def check_rest(self) -> None:
        """Check the digests of tensors that no parameter came from.

        Raises:
            Corrupted: a tensor read so far, or one of these, differs from its digest.
        """
        used = {entry.name for source in self.sources.values() for entry in source.assembly.entries}
        for name in sorted(self.expected.keys() - used):
            if name in self.folder.entries:
                self._compare(name, _sha256(self.folder, name))
        absent = sorted(self.expected.keys() - self.folder.entries.keys())
        if absent:
            raise Corrupted(f"{self.folder.folder} lacks {_listed(absent)}, which its expansion record names")
        if self.different:
            raise Corrupted(
                f"{self.folder.folder}: {_listed(self.different)} differ from the expansion record: the bytes "
                f"are not those that were expanded; restore the folder or expand again"
            )

    def _real(self, meta: nn.Parameter) -> nn.Parameter:
        if id(meta) not in self._filled:
            real = nn.Parameter(self._read(self.sources[id(meta)]), requires_grad=meta.requires_grad)
            self._filled[id(meta)] = (meta, real)  # the meta parameter is kept so that its id stays its own
        filled = self._filled[id(meta)][1]
        assert isinstance(filled, nn.Parameter)
        return filled

    def _read(self, source: Source) -> torch.Tensor:
        first = source.assembly.entries[0]
        values = torch.empty(source.assembly.shape, dtype=getattr(torch, FLOAT_DTYPES[first.dtype]))
        target, position = values.view(-1).view(torch.uint8).numpy().data, 0
        for entry in source.assembly.entries:
            self._read_into(entry.name, target[position : position + entry.nbytes])
            position += entry.nbytes
        return values.to(device=self.device, dtype=source.dtype)

    def _read_into(self, name: str, target: memoryview) -> None:
        digest, position = hashlib.sha256(), 0
        for chunk in self.folder.chunks(name):
            target[position : position + len(chunk)] = chunk
            position += len(chunk)
            if name in self.expected:
                digest.update(chunk)
        if name in self.expected:
            self._compare(name, digest.hexdigest())

    def _compare(self, name: str, sha256: str) -> None:
        if sha256 != self.expected[name]:
            self.different.append(name)


def open_weights(
    model: PreTrainedModel,
    folder: TensorFolder,
    dtype: torch.dtype,
    device: torch.device,
    expected: Mapping[str, str],
) -> WeightReader:
    """Match a model on the meta device with a folder's tensors, before anything is read.

    Raises:
        ModelRefused: tensors are missing, have another shape or no float dtype, or belong to no parameter.
    """
    stored, unknown = assemblies(model, folder.entries)
    sources: dict[int, Source] = {}
    parts: dict[str, Sequence[Part]] = {}
    problems: list[str] = []
    for aliases, parameter in _by_tensor(model.named_parameters(remove_duplicate=False)):
        copies = [stored[name] for name in aliases if name in stored]
        faults = _faults(folder, copies, tuple(parameter.shape)) if copies else [f"{aliases[0]} is missing"]
        problems += faults
        if not faults:
            sources[id(parameter)] = Source(copies[0], dtype)
            parts[aliases[0]] = [part for copy in copies for part in copy.parts]
    for name, buffer in model.named_buffers():
        if name in stored:
            problems += _faults(folder, [stored[name]], tuple(buffer.shape))
            sources[id(buffer)] = Source(stored[name], torch.promote_types(_buffer_dtype(model, name, buffer), dtype))
            parts[name] = stored[name].parts
    unknown = [name for name in unknown if not name.endswith(COMPUTED_SUFFIX)]
    problems += [f"{name} belongs to no parameter of {type(model).__name__}" for name in unknown]
    if problems:
        raise ModelRefused(f"{folder.folder} doesn't fit its config.json: {_listed(problems)}")
    return WeightReader(folder, device, expected, StoredParts(parts), sources)


def _by_tensor(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with all its names."""
    grouped: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in named:
        grouped.setdefault(id(parameter), ([], parameter))[0].append(name)
    yield from grouped.values()


def float32_buffers(model: PreTrainedModel, folder: TensorFolder) -> set[str]:
    """The stored tensors that become buffers which are held in float32 whatever the dtype of the parameters is."""
    stored, _ = assemblies(model, folder.entries)
    exact = [name for name, buffer in model.named_buffers() if _buffer_dtype(model, name, buffer) == torch.float32]
    return {entry.name for name in exact if name in stored for entry in stored[name].entries}


def _buffer_dtype(model: PreTrainedModel, name: str, buffer: torch.Tensor) -> torch.dtype:
    """The dtype that transformers holds a stored buffer in."""
    strict = model._keep_in_fp32_modules_strict or ()
    kept = any(re.search(pattern.replace("*", ".*"), name) for pattern in strict)
    return torch.float32 if kept else buffer.dtype


def fill_units(model: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The modules to fill one after another: each block, and each module outside the blocks that owns parameters, or
    buffers that are stored."""
    inside = {id(module) for module in blocks.modules()}
    whole_blocks = {id(block) for block in blocks}
    for module in model.modules():
        owns = any(parameter is not None for parameter in module._parameters.values())
        stores = module._buffers.keys() - module._non_persistent_buffers_set
        if id(module) in whole_blocks or ((owns or stores) and id(module) not in inside):
            yield module


def expected_digests(record: ExpansionRecord, share: tuple[int, int]) -> dict[str, str]:
    """SHA-256 of the tensors that one of several processes checks, dealt out by turns: those never trained, and those
    that an export noted.

    The tensors of fresh new blocks are known too: zero, or equal to those of the block they copy.

    Args:
        share: (rank, world size).
    """
    rank, world_size = share
    tensors, trained, zeroed = expected_tensors(record), record.trained, set(record.zeroed)
    family = family_named(record.family)
    untouched = [name for name in sorted(tensors) if not is_trained(family, trained, name)]
    digests = {
        name: _sha256_of_zeroed(family, name, tensors[name]) if name in zeroed else tensors[name].sha256
        for name in untouched[rank::world_size]
    }
    return digests | {name: trained.digests[name] for name in sorted(trained.digests)[rank::world_size]}


def fill_model(
    model: nn.Module,
    blocks: nn.ModuleList,
    reader: WeightReader,
    when_filled: Callable[[nn.Module], None] | None,
) -> None:
    """Fill the whole model, handing each filled module to `when_filled`."""
    for module in fill_units(model, blocks):
        reader.fill(module)
        if when_filled is not None:
            when_filled(module)


def _faults(folder: TensorFolder, copies: list[Assembly], shape: tuple[int, ...]) -> list[str]:
    """Why a tensor of this shape can't be read: from any of several stored copies, which must all be equal."""
    faults = []
    for assembly in copies:
        first = assembly.entries[0]
        if assembly.fault:
            faults.append(assembly.fault)
        elif assembly.shape != shape:
            found = f"{first.name} {_and_others(assembly)} shape {list(assembly.shape)}"
            faults.append(f"{found}, the configuration says {list(shape)}")
        elif first.dtype not in FLOAT_DTYPES:
            faults.append(f"{first.name} is stored as {first.dtype}: only unquantized weights can be trained")
    first_copy, *others = copies
    digests = _digests(folder, first_copy) if others and not faults else []
    different = [copy.entries[0].name for copy in others if not faults and _digests(folder, copy) != digests]
    name = first_copy.entries[0].name
    return faults + [f"{other} must equal {name} (they are tied) and doesn't" for other in different]


def _and_others(assembly: Assembly) -> str:
    others = len(assembly.entries) - 1
    return f"and {others} others make" if others else "has"


def _digests(folder: TensorFolder, assembly: Assembly) -> list[str]:
    return [_sha256(folder, entry.name) for entry in assembly.entries]


def _sha256(folder: TensorFolder, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in folder.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()


def _sha256_of_zeroed(family: Family, name: str, tensor: TensorDigest) -> str:
    digest, nbytes = hashlib.sha256(), prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
    for chunk in filled_chunks(tensor.dtype, zeroed_value(family, name), nbytes):
        digest.update(chunk)
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
