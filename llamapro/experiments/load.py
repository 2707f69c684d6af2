"""An experiment's configuration from a file: all of it valid, and its base and datasets there, or every problem."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from llamapro.config.base import Section
from llamapro.config.problems import check_schema
from llamapro.config.yaml_file import read_yaml
from llamapro.data.dataset import Dataset
from llamapro.errors import ConfigError
from llamapro.expansion.source import read_config
from llamapro.training.findings import Findings

Config = TypeVar("Config", bound=Section)


def load_experiment(path: Path, root: type[Config]) -> Config:
    """Read an experiment's configuration.

    Raises:
        UserError: the file is missing or is not a YAML mapping.
        ConfigError: unknown keys, wrong types or values, broken rules; all of them at once.
    """
    file = read_yaml(path)
    config, problems = check_schema(root, file.values, file.lines, {})
    if problems or config is None:
        raise ConfigError(problems, str(path))
    return config


def open_inputs(base: Path, datasets: Mapping[str, Path], measured: Collection[str]) -> dict[str, Dataset]:
    """Open the datasets of an experiment, by dotted key.

    Args:
        measured: the keys of those that models are measured on: they must have held-out text.

    Raises:
        ConfigError: what is not there or can't be used, also the base; all of it at once.
    """
    findings = Findings()
    findings.attempt("base", lambda: read_config(base))
    opened = {key: findings.attempt(key, partial(Dataset.open, path)) for key, path in datasets.items()}
    found = {key: dataset for key, dataset in opened.items() if dataset is not None}
    for key in measured:
        if key in found and found[key].split("heldout").tokens == 0:
            text = f"{datasets[key]} has no held-out documents; build it with `llamapro data build --heldout`"
            findings.problem(key, text)
    if findings.problems:
        raise ConfigError(findings.problems, "experiment")
    return found
