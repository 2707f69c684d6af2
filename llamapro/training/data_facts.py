"""Facts about the datasets: are they whole, made with the model's tokenizer, and large enough."""

from collections.abc import Mapping
from pathlib import Path

from llamapro.data.dataset import Dataset

from llamapro.config.root import RunConfig
from llamapro.training.findings import Findings

_SHOWN_DIGITS = 12


def check_sources(config: RunConfig, identity: str | None, findings: Findings) -> dict[str, Dataset]:
    """Open every source and check it.

    Args:
        identity: of the model's tokenizer; None when it isn't known, and then not compared.
    """
    opened = {}
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        dataset = findings.attempt(f"{key}.path", lambda path=source.path: Dataset.open(path))  # type: ignore[misc]
        if dataset is None:
            continue
        opened[name] = dataset
        _check_tokenizer(f"{key}.path", dataset, identity, findings)
        if dataset.split("train").tokens == 0:
            findings.problem(f"{key}.path", f"{source.path} has no training documents; all of them are held out")
    return opened


def check_validation_sets(
    config: RunConfig, sources: Mapping[str, Dataset], identity: str | None, findings: Findings
) -> dict[str, Dataset]:
    """The datasets whose held-out splits are scored; of `auto`, those that have any held-out document."""
    named = config.validation.sets
    if isinstance(named, Mapping):
        return _named_sets(named, identity, findings)
    with_text = {name: dataset for name, dataset in sources.items() if dataset.split("heldout").tokens > 0}
    for name in sources.keys() - with_text.keys():
        findings.warn("validation.sets", f"source {name} has no held-out documents and is not validated")
    return with_text


def warn_of_repeats(config: RunConfig, sources: Mapping[str, Dataset], steps: int | None, findings: Findings) -> None:
    """Say which weighted sources start over during the run, and how often they are seen."""
    weights = {name: source.weight for name, source in config.data.sources.items() if source.weight is not None}
    if steps is None or not weights or config.data.stages:
        return
    run_tokens = steps * config.batch.global_sequences * config.data.sequence_length
    for name, dataset in sources.items():
        tokens = dataset.split("train").tokens
        if name not in weights or not tokens:
            continue
        epochs = run_tokens * weights[name] / sum(weights.values()) / tokens
        if epochs > 1:
            text = f"its {tokens:,} tokens run out; the run sees them {epochs:.1f} times"
            findings.warn(f"data.sources.{name}", text)


def _named_sets(named: Mapping[str, Path], identity: str | None, findings: Findings) -> dict[str, Dataset]:
    opened = {}
    for name, path in named.items():
        key = f"validation.sets.{name}"
        dataset = findings.attempt(key, lambda path=path: Dataset.open(path))  # type: ignore[misc]
        if dataset is None:
            continue
        opened[name] = dataset
        _check_tokenizer(key, dataset, identity, findings)
        if dataset.split("heldout").tokens == 0:
            text = f"{path} has no held-out documents; build it with `llamapro data build --heldout`"
            findings.problem(key, text)
    return opened


def _check_tokenizer(key: str, dataset: Dataset, identity: str | None, findings: Findings) -> None:
    built = dataset.manifest.tokenizer_identity
    if identity is not None and built != identity:
        findings.problem(
            key,
            f"{dataset.folder} was made with another tokenizer ({built[:_SHOWN_DIGITS]}) than the model's "
            f"({identity[:_SHOWN_DIGITS]}): its ids mean other text; build it again with `llamapro data build "
            "--tokenizer` and this model",
        )
