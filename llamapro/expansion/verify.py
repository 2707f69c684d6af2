"""Proof, from the files alone, that an expanded model is what its record says and that its base never moved.

Each rule says how much it covered. What the record lists as trained is exempt from the content rules, never from the
rules about names and shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamapro import console
from llamapro.errors import CheckFailed, ModelRefused
from llamapro.expansion.config import depth_problems
from llamapro.expansion.families import (
    Family,
    block_tensor_name,
    canonical_names,
    family_named,
    parse_block_index,
    split_block_name,
)
from llamapro.expansion.kinds import (
    ModelKinds,
    base_problems,
    build_without_weights,
    copy_problems,
    loading_problems,
    model_kinds,
    position_problems,
)
from llamapro.expansion.lineage import untrained_base_tensors
from llamapro.expansion.record import CONFIG_KEY, CONFIG_NAME, RECORD_NAME, ExpansionRecord, TensorDigest, read_record
from llamapro.expansion.source import HARMLESS_PRIVATE_FIELDS, read_config
from llamapro.expansion.streams import Advance, counted, in_parallel, observed, sha256_of
from llamapro.expansion.strength import described
from llamapro.expansion.zero_rule import zero_rule_problems
from llamapro.files.tensors import DTYPE_BYTES, RunningDigest, TensorFolder, cast_chunks

# Fields of config.json that say nothing of what a model computes, or that the tensors say themselves.
FREE_FIELDS = HARMLESS_PRIVATE_FIELDS | {CONFIG_KEY, "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class RuleResult:
    """One rule: what it says, how many things it covered, and one sentence for each breach."""

    rule: str
    covered: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """All rules that were applied to a model, and what was exempt."""

    record: ExpansionRecord
    rules: tuple[RuleResult, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Every breach of every rule."""
        return tuple(problem for rule in self.rules for problem in rule.problems)


@dataclass(frozen=True)
class _Model:
    folder: Path
    tensors: TensorFolder
    record: ExpansionRecord
    family: Family
    advance: Advance


def verify(model: Path, base: Path | None) -> VerifyReport:
    """Check a model against its record, and the record against the base's files if `base` is given.

    Raises:
        CheckFailed: the model has no record.
        Corrupted: files that can't be read, or a record that disagrees with config.json.
        ModelRefused: a family of a newer version, or a base without safetensors.
    """
    record = read_record(model)
    if record is None:
        raise CheckFailed(
            f"{model} has no {RECORD_NAME}: it was not made by `llamapro expand`, so nothing can be proved"
        )
    tensors = TensorFolder.open(model)
    base_tensors = None if base is None else TensorFolder.open(base)
    total = tensors.total_bytes + (base_tensors.total_bytes if base_tensors else 0)
    with console.progress("verifying", total, "bytes") as advance:
        opened = _Model(model, tensors, record, family_named(record.family), advance)
        rules = [_check_config(opened), _check_names(opened)]
        if not any(rule.problems for rule in rules):
            rules += _check_architecture(opened, base)
        rules += [_check_base_tensors(opened), *_check_new_blocks(opened)]
        if record.trained.digests:
            rules.append(_check_trained(opened))
        if base_tensors is not None:
            rules.append(_check_against_base(opened, base_tensors))
    return VerifyReport(record, tuple(rules))


def _check_config(model: _Model) -> RuleResult:
    rule = f"{CONFIG_NAME} agrees with the record"
    config, record = read_config(model.folder), model.record
    problems = [
        f"{CONFIG_NAME}: {field} is {config.get(field)!r}, the record says {value!r}"
        for field, value in _config_facts(model.family, config, record)
        if config.get(field) != value
    ]
    problems = problems or depth_problems(config, model.family)
    # The compact copy was compared field by field when the record was read.
    return RuleResult(rule, 1, tuple(problems))


def _config_facts(family: Family, config: Mapping[str, Any], record: ExpansionRecord) -> list[tuple[str, Any]]:
    depth = [field for field in family.blocks_fields if field in config] or [family.blocks_fields[0]]
    return [("model_type", record.model_type), *((field, record.blocks) for field in depth)]


def _check_names(model: _Model) -> RuleResult:
    expected = {name: (digest.dtype, digest.shape) for name, digest in expected_tensors(model.record).items()}
    found = {name: (entry.dtype, entry.shape) for name, entry in model.tensors.entries.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is in the files, but not in the record" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, the record says {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return RuleResult("tensor names, shapes and dtypes are exactly the record's", len(expected), tuple(problems))


def _check_architecture(model: _Model, base: Path | None) -> list[RuleResult]:
    """What plain transformers makes of config.json and of the tensors' names and shapes."""
    loads = "transformers builds the model and finds exactly its tensors in the files"
    record, tensors = model.record, model.tensors
    try:
        built = build_without_weights(model.folder)
        kinds = model_kinds(built, model.family)
    except ModelRefused as error:
        return [RuleResult(loads, len(tensors.entries), (str(error),))]
    rules = [
        RuleResult(loads, len(tensors.entries), tuple(loading_problems(built, tensors))),
        RuleResult("every block has its own KV cache slot", record.blocks, tuple(position_problems(kinds))),
        RuleResult(
            "new blocks are of their source's kind", len(record.new_blocks), tuple(copy_problems(kinds, record))
        ),
    ]
    return rules if base is None else [*rules, *_check_architecture_of_base(model, kinds, base)]


def _check_architecture_of_base(model: _Model, kinds: ModelKinds, base: Path) -> list[RuleResult]:
    config, base_config = read_config(model.folder), read_config(base)
    problems = base_problems(kinds, model_kinds(build_without_weights(base), model.family), model.record)
    return [
        RuleResult("original blocks are of the base's kind", model.record.base_blocks, tuple(problems)),
        RuleResult(
            f"{CONFIG_NAME} is the base's, but for the depth",
            len(base_config),
            tuple(_config_changes(model.family, config, base_config)),
        ),
    ]


def _config_changes(family: Family, config: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    # What depends on the depth shows in the blocks' kinds, dtypes in the tensors.
    free = FREE_FIELDS.union(family.blocks_fields, *(rule.fields for rule in family.depth_rules))
    return [
        f"{CONFIG_NAME}: {field} is {config.get(field)!r}, the base's is {base.get(field)!r}"
        for field in sorted((config.keys() | base.keys()) - free)
        if config.get(field) != base.get(field)
    ]


def expected_tensors(record: ExpansionRecord) -> dict[str, TensorDigest]:
    """Every tensor that a model must have, by name; for a new block's tensor, the digest of the one it copied."""
    family = family_named(record.family)
    expected = dict(record.base_tensors)
    for block in record.new_blocks:
        source = record.source_of(block)
        for name, digest in record.base_tensors.items():
            parsed = split_block_name(family, name)
            if parsed is not None and parsed[0] == source:
                expected[block_tensor_name(family, block, parsed[1])] = digest
    return expected


def _check_base_tensors(model: _Model) -> RuleResult:
    untrained = untrained_base_tensors(model.record)
    problems = _differing(model, untrained, "differs from the base (SHA-256)")
    return RuleResult("base tensors are bit-identical to the base as written", len(untrained), tuple(problems))


def _check_new_blocks(model: _Model) -> list[RuleResult]:
    record, family = model.record, model.family
    fresh = record.untrained_blocks()
    zeroed = tuple(name for name in record.zeroed if parse_block_index(family, name) in fresh)
    zero_problems = zero_rule_problems(family, model.tensors, fresh, zeroed)
    copied = {
        name: digest
        for name, digest in expected_tensors(record).items()
        if parse_block_index(family, name) in fresh and name not in zeroed and name not in record.trained.tensors
    }
    copy_problems = _differing(model, copied, "differs from the block it copies (SHA-256)")
    return [
        RuleResult(
            f"declared tensors of the {len(fresh)} fresh new blocks are zero", len(zeroed), tuple(zero_problems)
        ),
        RuleResult("all other tensors of fresh new blocks equal their source", len(copied), tuple(copy_problems)),
    ]


def _check_trained(model: _Model) -> RuleResult:
    known = expected_tensors(model.record)
    exported = {
        name: known[name].model_copy(update={"sha256": sha256})
        for name, sha256 in model.record.trained.digests.items()
        if name in known
    }
    problems = [
        f"{name}: the record has a digest of it, but no such tensor"
        for name in model.record.trained.digests
        if name not in known
    ]
    problems += _differing(model, exported, "differs from what was exported (SHA-256)")
    rule = "trained tensors are bit-identical to what was exported"
    if shares := described({int(block): share for block, share in model.record.trained.strengths.items()}):
        rule += f", new blocks at strength {shares}"
    return RuleResult(rule, len(exported), tuple(problems))


def _check_against_base(model: _Model, base: TensorFolder) -> RuleResult:
    digests = {digest.base_name: digest for digest in model.record.base_tensors.values()}
    problems = [f"base tensor {name} is not in {base.folder}" for name in digests if name not in base.entries]
    problems += [
        f"{base.folder} has tensor {name}, which the record does not"
        for name in canonical_names(model.family, base.entries)
        if name not in digests
    ]
    compared = [name for name in digests if name in base.entries]
    differences = in_parallel(partial(_base_difference, base, digests), compared, model.advance)
    problems += [f"base tensor {name} {found}" for name, found in zip(compared, differences, strict=True) if found]
    converted = sum(digest.dtype != digest.source_dtype for digest in digests.values())
    rule = f"the record's source digests are those of {base.folder}"
    if converted:
        rule += f", and the base converted to another dtype is what was written ({converted} tensors)"
    return RuleResult(rule, len(digests), tuple(problems))


def _base_difference(
    base: TensorFolder, digests: Mapping[str, TensorDigest], name: str, advance: Advance
) -> str | None:
    entry, digest = base.entries[name], digests[name]
    if (entry.dtype, entry.shape) != (digest.source_dtype, digest.shape):
        return f"is {entry.dtype} {entry.shape}, the record says {digest.source_dtype} {digest.shape}"
    if entry.dtype == digest.dtype:
        same = sha256_of(base, name, advance) == digest.source_sha256
        return None if same else "differs from the one that was expanded (SHA-256)"
    read, written = RunningDigest(entry.item_bytes), RunningDigest(DTYPE_BYTES[digest.dtype])
    chunks = counted(observed(base.chunks(name), read), advance)
    for chunk in cast_chunks(chunks, entry.dtype, digest.dtype):
        written.update(chunk)
    if read.sha256 != digest.source_sha256:
        return "differs from the one that was expanded (SHA-256)"
    return None if written.sha256 == digest.sha256 else f"converted to {digest.dtype} differs from what was written"


def _differing(model: _Model, digests: Mapping[str, TensorDigest], sentence: str) -> list[str]:
    entries = model.tensors.entries
    # Another shape or dtype is reported by the rule about names.
    comparable = [
        name
        for name, digest in digests.items()
        if name in entries and (entries[name].dtype, entries[name].shape) == (digest.dtype, digest.shape)
    ]
    found = in_parallel(partial(sha256_of, model.tensors), comparable, model.advance)
    return [
        f"{name} {sentence}" for name, sha256 in zip(comparable, found, strict=True) if sha256 != digests[name].sha256
    ]
