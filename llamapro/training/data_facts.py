"""Facts about the datasets: are they whole, made with the model's tokenizer, and large enough."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamapro.config.root import RunConfig
from llamapro.data.dataset import Dataset
from llamapro.training.findings import Findings


@dataclass(frozen=True)
class ModelText:
    """What a model's datasets have to agree with.

    Attributes:
        vocabulary: rows of its embedding.
    """

    folder: Path
    tokenizer_identity: str
    vocabulary: int


def check_sources(config: RunConfig, model: ModelText | None, findings: Findings) -> dict[str, Dataset]:
    """Open every source and check it.

    Args:
        model: what the datasets have to agree with; None when it isn't known, and then nothing is compared.
    """
    opened = {}
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        dataset = findings.attempt(f"{key}.path", lambda path=source.path: Dataset.open(path))  # type: ignore[misc]
        if dataset is None:
            continue
        opened[name] = dataset
        _check_tokenizer(f"{key}.path", dataset, model, findings)
        if dataset.split("train").tokens == 0:
            findings.problem(f"{key}.path", f"{source.path} has no training documents; all of them are held out")
        _warn_of_long_conversations(f"{key}.path", dataset, config.data.sequence_length, findings)
    return opened


def _warn_of_long_conversations(key: str, dataset: Dataset, sequence_length: int, findings: Findings) -> None:
    if "chat_template" not in dataset.manifest.options:
        return
    shards = dataset.split("train").shards
    lengths = findings.attempt(key, lambda: [shard.lengths() for shard in shards]) or []
    if long := sum(int((one > sequence_length).sum()) for one in lengths):
        findings.warn(
            key,
            f"{long:,} conversations are longer than data.sequence_length {sequence_length:,}: the rest of each is in "
            "another sequence, without what came before; use longer sequences, or cut them with `llamapro data build "
            f"--max-tokens {sequence_length}`",
        )


def check_validation_sets(
    config: RunConfig, sources: Mapping[str, Dataset], model: ModelText | None, findings: Findings
) -> dict[str, Dataset]:
    """The datasets whose held-out splits are scored; of `auto`, those that have any held-out document."""
    named = config.validation.sets
    if isinstance(named, Mapping):
        return _named_sets(named, model, findings)
    with_text = {name: dataset for name, dataset in sources.items() if dataset.split("heldout").tokens > 0}
    for name in [name for name in sources if name not in with_text]:
        findings.warn("validation.sets", f"source {name} has no held-out documents and is not validated")
    return with_text


def warn_of_repeats(config: RunConfig, sources: Mapping[str, Dataset], steps: int | None, findings: Findings) -> None:
    """Say which weighted sources start over during the run: after which step, and how often the run sees them."""
    if steps is None or any(source.weight is None for source in config.data.sources.values()):
        return
    for name, dataset in sources.items():
        tokens = dataset.split("train").tokens
        seen, end = _tokens_seen(config, name, steps, tokens)
        if seen > tokens > 0:
            text = f"its {tokens:,} tokens run out at step {end:,}; the run sees them {seen / tokens:.1f} times"
            findings.warn(f"data.sources.{name}", text)


def _tokens_seen(config: RunConfig, name: str, steps: int, tokens: int) -> tuple[float, int]:
    """Tokens that the whole run takes from a source, and the step in which it has taken `tokens` of them."""
    per_step = config.batch.global_sequences * config.data.sequence_length
    stages = [(0, {n: source.weight or 0.0 for n, source in config.data.sources.items()})]
    stages += [(stage.from_step, dict(stage.weights)) for stage in config.data.stages if stage.from_step < steps]
    stops = [first for first, _ in stages[1:]] + [steps]
    seen, end = 0.0, steps
    for (first, weights), stop in zip(stages, stops, strict=True):
        rate = per_step * weights.get(name, 0.0) / sum(weights.values())
        if seen <= tokens < seen + rate * (stop - first):
            end = first + math.floor((tokens - seen) / rate) + 1
        seen += rate * (stop - first)
    return seen, end


def _named_sets(named: Mapping[str, Path], model: ModelText | None, findings: Findings) -> dict[str, Dataset]:
    opened = {}
    for name, path in named.items():
        key = f"validation.sets.{name}"
        dataset = findings.attempt(key, lambda path=path: Dataset.open(path))  # type: ignore[misc]
        if dataset is None:
            continue
        opened[name] = dataset
        _check_tokenizer(key, dataset, model, findings)
        if dataset.split("heldout").tokens == 0:
            text = f"{path} has no held-out documents; build it with `llamapro data build --heldout`"
            findings.problem(key, text)
    return opened


def _check_tokenizer(key: str, dataset: Dataset, model: ModelText | None, findings: Findings) -> None:
    if model is None:
        return
    findings.attempt(key, lambda: dataset.require_tokenizer(model.tokenizer_identity, str(model.folder)))
    if dataset.manifest.vocab_size > model.vocabulary:
        findings.problem(
            key,
            f"{dataset.folder} has ids up to {dataset.manifest.vocab_size - 1}, but {model.folder} embeds only "
            f"{model.vocabulary}; resize the base's embedding before expanding, or use its own tokenizer",
        )
