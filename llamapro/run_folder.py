"""Where things lie in a run folder: the only place that knows."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llamapro.errors import UserError
from llamapro.files.atomic import write_atomic


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration of the latest start, as YAML."""
        return self.path / "config.yaml"

    @property
    def history(self) -> Path:
        """Folder of the resolved configurations of all starts that changed it: `config-0001.yaml`, …"""
        return self.path / "history"

    @property
    def command_file(self) -> Path:
        """One line per start: UTC time and command."""
        return self.path / "command.txt"

    @property
    def environment_file(self) -> Path:
        """Versions and hardware of the latest start, as JSON."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """Metrics and events, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints: `step-00001200`, …"""
        return self.path / "checkpoints"

    @property
    def latest_pointer(self) -> Path:
        """File with the name of the newest checkpoint, for people and scripts; manifests decide."""
        return self.path / "latest"

    @property
    def packs(self) -> Path:
        """Folder of pack plans whose dataset folder is read-only."""
        return self.path / "packs"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the run to save and stop."""
        return self.path / "STOP"

    @property
    def restarts_file(self) -> Path:
        """How often a batch job queued again without a newer checkpoint, as JSON."""
        return self.path / "restarts.json"

    @property
    def report_file(self) -> Path:
        """The run's report, one HTML page."""
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs: `rank-0.log`, …"""
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        """The log file of one rank."""
        return self.logs / f"rank-{rank}.log"

    def rank_sign(self, rank: int) -> Path:
        """One rank's latest sign of life, as JSON."""
        return self.logs / f"rank-{rank}.sign.json"

    def create(self) -> None:
        """Make the folder and the folders in it.

        Raises:
            UserError: the path is a file, or can't be made.
        """
        try:
            for folder in (self.path, self.history, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.folder: {self.path} can't be made a folder: {error}") from error

    def prepare(self, config_text: str, command: str, environment: Mapping[str, Any]) -> None:
        """Make the folder and write down what this start is; on rank 0 only, before anything else is written there.

        Args:
            config_text: the resolved configuration as YAML; kept in `history` when it differs from the last one.
            command: the command line, one line of text.
            environment: JSON values.
        """
        self.create()
        kept = sorted(self.history.glob("config-*.yaml"))
        if not kept or kept[-1].read_text(encoding="utf-8") != config_text:
            write_atomic(self.history / f"config-{len(kept) + 1:04}.yaml", config_text)
        write_atomic(self.config_file, config_text)
        write_atomic(self.environment_file, orjson.dumps(dict(environment), option=orjson.OPT_INDENT_2) + b"\n")
        earlier = self.command_file.read_text(encoding="utf-8") if self.command_file.exists() else ""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_atomic(self.command_file, f"{earlier}{now} {command}\n")
