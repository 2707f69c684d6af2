"""The RUN argument of commands that work on an existing run folder."""

from pathlib import Path

from llamapro.errors import UserError
from llamapro.run_folder import RunFolder


def existing_run(path: Path) -> RunFolder:
    """The run folder at `path`.

    Raises:
        UserError: there is no folder, or no run was ever started in it.
    """
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        found = "is not a run folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {found}: expected {folder.config_file}; give the folder that run.folder names")
    return folder
