"""A run configuration from a file and a command line: all of it valid, or every problem at once."""

import io
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from llamapro.config.help import print_help
from llamapro.config.overrides import apply_overrides, parse_overrides
from llamapro.config.problems import check_schema
from llamapro.config.root import RunConfig
from llamapro.config.yaml_file import read_yaml
from llamapro.errors import ConfigError

_DUMP_WIDTH = 120
HELP_FLAGS = frozenset({"-h", "--help"})


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: YAML file.
        overrides: command-line words `--section.field value`, laid over the file's values. `--help` among them prints
            every setting with the value that it would have and ends the program.

    Raises:
        UserError: the file is missing or is not a YAML mapping.
        ConfigError: unknown keys, wrong types or values, broken rules, malformed words; all of them at once.
        SystemExit: after printing the help.
    """
    file = read_yaml(path)
    given, problems = parse_overrides([word for word in overrides if word not in HELP_FLAGS])
    values, misplaced = apply_overrides(file.values, given)
    origins = {override.path: override.flag for override in given}
    config, wrong = check_schema(RunConfig, values, file.lines, origins)
    problems = [*problems, *misplaced, *wrong]
    if problems or config is None:
        raise ConfigError(problems, str(path))
    if HELP_FLAGS & set(overrides):
        print_help(config, path)
        raise SystemExit(0)
    return config


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, every setting spelled out; `load_config` gives the same object back."""
    text = io.StringIO()
    yaml = YAML()
    yaml.width = _DUMP_WIDTH
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()
