"""DeepSpeed's launcher for several hosts: no secret on a command line or in a log; stopping reaches its own ranks only.

Left alone it writes every variable whose name begins with MLFLOW, PYTHON, MV2, UCX or NCCL, and all of
`.deepspeed_env`, unquoted into the command that it sends to every host, and logs that command; when it is ended it
kills whatever else runs under a DeepSpeed launcher on those hosts, and no rank can save. Its options are its own.
"""

import argparse
import logging
import os
import re
import shlex
import signal
import subprocess
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deepspeed.launcher import multinode_runner, runner  # type: ignore[import-untyped]
from deepspeed.utils import logger  # type: ignore[import-untyped]

from llamapro import console
from llamapro.errors import RetryLater, UserError

SECRET_NAME: Final = re.compile(
    r"^MLFLOW|TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|AUTH(?!OR)|SIGNATURE|COOKIE|(API|ACCESS|ACCOUNT|ENCRYPTION)_?KEY",
    re.I,
)
PASSWORD_IN_ADDRESS: Final = re.compile(r"://[^/\s]*@")
SHORTEST_SECRET: Final = 6
HOST_LOST: Final = 255
"""What ssh ends with when it can't reach a host, or lost it; no program of ours does."""
# A lost host is noticed within a minute; an earlier option of the user's counts more.
KEEPALIVE: Final = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def launch_on_hosts(arguments: Sequence[str]) -> int:
    """Run `deepspeed` with these arguments; returns what the ranks ended with.

    SIGINT and SIGTERM ask all ranks to save and stop.

    Raises:
        UserError: the hostfile, the choice of hosts or the launcher can't be used.
        RetryLater: a host was lost, or can't be reached.
    """
    _require_hostfile(runner.parse_args(list(arguments)))
    os.environ["PDSH_SSH_ARGS_APPEND"] = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {KEEPALIVE}".strip()
    with _safe_runner(), _redacted_log():
        try:
            runner.main(list(arguments))
        except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:  # how it refuses
            raise UserError(_redacted(str(error), secret_values())) from error
        except SystemExit as ended:
            return _meaning(ended.code)
    return 0


def is_secret(name: str, value: str) -> bool:
    """Whether a variable may hold a secret, by its name or by a password in its address."""
    return bool(SECRET_NAME.search(name) or PASSWORD_IN_ADDRESS.search(value))


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What must not be seen: values of the environment and of `.deepspeed_env`, the longest first."""
    variables = [*environment.items(), *_listed_variables()]
    values = {value for name, value in variables if is_secret(name, value) and len(value) >= SHORTEST_SECRET}
    return sorted(values, key=len, reverse=True)


def _listed_variables() -> Iterator[tuple[str, str]]:
    """What DeepSpeed reads from `.deepspeed_env`, in the home folder and here."""
    for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
        file = Path(folder, runner.DEEPSPEED_ENVIRONMENT_NAME)
        for line in file.read_text().splitlines() if file.is_file() else ():
            name, equals, value = line.partition("=")
            if not equals:
                raise UserError(f"{file}: {_redacted(line, [line])} is not NAME=VALUE; every line must be")
            yield name.strip(), value.strip()


def _require_hostfile(chosen: argparse.Namespace) -> None:
    """DeepSpeed would go on with this machine alone."""
    if not Path(chosen.hostfile).is_file():
        raise UserError(f"--hostfile {chosen.hostfile}: there is no such file; each of its lines is: HOST slots=GPUS")


def _meaning(code: Any) -> int:
    if code == HOST_LOST:
        raise RetryLater("a host was lost, or can't be reached by ssh; where it is back the same command continues")
    return int(code or 0)


class _Pdsh(multinode_runner.PDSHRunner):  # type: ignore[misc]
    """Everything quoted for the remote shell; stopping reaches the ranks of this job, through USR1, and no others."""

    def parse_user_args(self) -> list[str]:
        return [shlex.quote(argument) for argument in self.args.user_args]

    def get_cmd(self, environment: dict[str, str], active_resources: Mapping[str, Any]) -> tuple[Any, ...]:
        command, _, environment = super().get_cmd(environment, active_resources)
        everywhere = command[: command.index("-w") + 2] + shlex.split(self.args.launcher_args)
        launchers = (
            rf"^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch --world_info={self.world_info_base64} .*"
            rf"--master_addr={re.escape(self.args.master_addr)} --master_port={self.args.master_port} "
        )
        stop = f"pkill -USR1 -P $(pgrep -d, -f {shlex.quote(launchers)})"
        _stop_by([*everywhere, stop], environment)
        return command, [], environment


class _OpenMpi(multinode_runner.OpenMPIRunner):  # type: ignore[misc]
    """Tells the ranks where to meet, which DeepSpeed leaves to the user here."""

    def get_cmd(self, environment: dict[str, str], active_resources: Mapping[str, Any]) -> Any:
        self.exports.setdefault("MASTER_ADDR", self.args.master_addr)
        self.exports.setdefault("MASTER_PORT", str(self.args.master_port))
        return super().get_cmd(environment, active_resources)


def _export(chosen: Any, key: str, value: str) -> None:
    """Export a variable to the ranks, quoted where a shell will read it; secrets stay here."""
    name, text = key.strip(), value.strip()
    if is_secret(name, text):
        console.warning(f"{name} is not given to the hosts: others can read command lines; keep it in a file there")
    else:
        chosen.exports[name] = shlex.quote(text) if isinstance(chosen, multinode_runner.PDSHRunner) else text


def _stop_by(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """From now on, SIGINT and SIGTERM run this command; the ranks end by themselves then."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        console.info(f"{signal.Signals(number).name}: asking all ranks to save and stop")
        subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


@contextmanager
def _safe_runner() -> Iterator[None]:
    """Put our launchers in the place of DeepSpeed's, and keep it from handling signals."""
    deaf = types.SimpleNamespace(SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM, signal=lambda number, handler: None)
    changes: list[tuple[Any, str, Any]] = [
        (multinode_runner.MultiNodeRunner, "add_export", _export),
        (runner, "PDSHRunner", _Pdsh),
        (runner, "OpenMPIRunner", _OpenMpi),
        (runner, "signal", deaf),
    ]
    former = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in former:
            setattr(owner, name, value)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _redacted_log() -> Iterator[None]:
    values = secret_values()

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = _redacted(record.getMessage(), values), ()
        return True

    logger.addFilter(redact)
    try:
        yield
    finally:
        logger.removeFilter(redact)


def _redacted(text: str, values: Sequence[str]) -> str:
    for value in values:
        text = text.replace(value, "[secret]")
    return text
