"""`--help` of a launch: every setting, its meaning, its type, and the value that the file gives it."""

import contextlib
import io
from pathlib import Path

from llamapro import console
from llamapro.config.root import RunConfig


def print_help(config: RunConfig, path: Path) -> None:
    """Print every setting with its value in `config` (standard output, rank 0 only)."""
    console.result(help_text(config, path))


def help_text(config: RunConfig, path: Path) -> str:
    """The help page: usage, then one box per section, as tyro formats it."""
    import tyro

    page = io.StringIO()
    marks = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(
            RunConfig,
            prog=f"launch/pretrain.py --config {path}",
            description=f"Settings, with the values of {path}. Write them as in YAML; several words make a list.",
            default=config,
            args=["--help"],
            config=marks,
            use_underscores=True,
        )
    return page.getvalue().rstrip()
