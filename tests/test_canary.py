"""No secret of the environment reaches anything that a run produces: logs, metrics, checkpoints, exports, reports.

Values that look like secrets stand in the environment of real commands; then every byte that came out is searched.
"""

import base64
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.source import ROOT
from tests.support.training import prepare, settings

SECRET_NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "DATABASE_URL",
)
# As a launcher under another account may leave them; none of these is a secret.
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_SECONDS = 300
# Where a user may put one by mistake, or where another program looks for it.
MISPLACED = {name: f"canary-{name.lower()}-93ad10ff" for name in ("KEY_IN_CONFIG", "FLAG", "DEEPSPEED_FILE")}
SECRETS = {name: f"canary-{index}-5f1c0e77ab42-{name.lower()}" for index, name in enumerate(SECRET_NAMES)}


class Workplace:
    """A folder in which commands run with secrets in their environment; what they say is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[str, bytes] = {}

    def run(self, name: str, *words: str, expected: int = 0) -> None:
        clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER_NAMES}
        environment = {**clean, **SECRETS, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, timeout=TIMEOUT_SECONDS)
        self.said[f"{name}: standard output"] = done.stdout
        self.said[f"{name}: standard error"] = done.stderr
        assert done.returncode == expected, f"{shlex.join(words)}\n{done.stdout.decode()}\n{done.stderr.decode()}"

    def run_llamapro(self, command: str, *words: str) -> None:
        self.run(command, sys.executable, "-m", "llamapro", command, *words)

    def everything(self) -> dict[str, bytes]:
        """All bytes that were written or said, by where."""
        files = {
            str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        }
        return files | self.said


def found(text: str, everything: dict[str, bytes]) -> list[str]:
    """Where a text stands, as it is or encoded as in headers of web requests and in JSON of hexadecimal bytes."""
    raw = text.encode()
    # Inside a longer text base64 begins at any of three offsets; the ends depend on what stands beside.
    encoded = [base64.b64encode(b"\0" * offset + raw)[4 if offset else 0 : -4] for offset in range(3)]
    forms = [raw, raw[::-1], raw.hex().encode(), *encoded]
    return sorted({place for place, content in everything.items() for form in forms if form in content})


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Two ranks under the launcher train with every tracker that there is, fail, go on; then export and report."""
    folder = prepare(tmp_path_factory.mktemp("canary"))
    workplace = Workplace(folder)
    # Launchers of several machines pass what stands in this file on, by command lines that they log.
    (folder / ".deepspeed_env").write_text(f"NCCL_DEBUG={MISPLACED['DEEPSPEED_FILE']}\n")
    values = settings(
        folder,
        schedule={"steps": 4},
        checkpoint={"every_steps": 2},
        validation={"every_steps": 2},
        logging={"trackers": ["tensorboard"]},
    )
    config = write(folder / "run.yaml", values)
    wrong = write(folder / "wrong.yaml", settings(folder, "wrong", model={"path": "nowhere"}))
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(20000 + os.getpid() % 10000)]
    script = str(ROOT / "launch" / "pretrain.py")
    workplace.run("training", *launcher, "--num_gpus", "2", script, "--config", config)
    workplace.run("a wrong configuration", sys.executable, script, "--config", wrong, "--debug", expected=1)
    misplaced = write(folder / "misplaced.yaml", {**values, "logging": {"wandb_api_key": MISPLACED["KEY_IN_CONFIG"]}})
    flag = f"--logging.wandb_api_key={MISPLACED['FLAG']}"
    workplace.run("a key in the configuration", sys.executable, script, "--config", misplaced, expected=2)
    workplace.run("a key on the command line", sys.executable, script, "--config", config, flag, expected=2)
    workplace.run("a finished run", sys.executable, script, "--config", config)
    workplace.run_llamapro("export", "run", "exported")
    workplace.run_llamapro("evaluate", "run", "--text", "law=law:heldout", "--output", "evaluated")
    workplace.run_llamapro("report", "run")
    workplace.run_llamapro("checkpoint", "ls", "run")
    return workplace


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_bytes(orjson.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_of_the_environment_is_nowhere(used: Workplace, name: str) -> None:
    assert found(SECRETS[name], used.everything()) == []


@pytest.mark.parametrize("name", MISPLACED)
def test_a_misplaced_secret_is_only_where_it_was_put(used: Workplace, name: str) -> None:
    """A setting that there is not is refused by its name; its value may be anything and is not repeated."""
    places = {"KEY_IN_CONFIG": ["misplaced.yaml"], "DEEPSPEED_FILE": [".deepspeed_env"]}
    assert found(MISPLACED[name], used.everything()) == places.get(name, [])
    if name != "DEEPSPEED_FILE":
        assert any(b"wandb_api_key" in content for place, content in used.everything().items() if "standard e" in place)


def test_a_stack_dump_shows_no_values(tmp_path: Path) -> None:
    """What a rank writes when it is ended in the middle of a step."""
    workplace = Workplace(tmp_path)
    program = (
        "import os, time\n"
        "from llamapro.training.signals import watch_signals\n"
        "def stuck(secret):\n"
        "    time.sleep(60)\n"
        "with watch_signals(grace_seconds=0, step_timeout_seconds=60) as stop:\n"
        "    stop.request('the test asks')\n"
        "    stuck(os.environ['HF_TOKEN'])\n"
    )
    workplace.run("a forced end", sys.executable, "-c", program, expected=75)
    assert b"in stuck" in workplace.said["a forced end: standard error"]
    assert found(SECRETS["HF_TOKEN"], workplace.said) == []


def test_every_kind_of_file_was_searched(used: Workplace) -> None:
    """What the runs really say is found where it must stand, also in files that are not text."""
    everything = used.everything()
    for text, place in [
        (str(used.folder / "law"), "run/config.yaml"),
        ("launch/pretrain.py", "run/command.txt"),
        ("deepspeed", "run/environment.json"),
        ("gradient_norm", "run/metrics.jsonl"),
        ("share_kind", "run/checkpoints/step-00000004/state.json"),
        ("exp_avg_sq", "run/checkpoints/step-00000004/rank-00001.safetensors"),
        ("model.layers.5", "exported/model.safetensors"),
        ("held-out", "training: standard error"),
        ("run.yaml", "training: standard output"),
        ("law", "run/report.html"),
        ("law", "evaluated/results.json"),
    ]:
        assert place in found(text, everything), f"{text} in {place}"
    assert any(place.startswith("run/tensorboard/") for place in found("gradient_norm", everything))


@pytest.mark.parametrize("encode", [bytes, lambda raw: raw[::-1], lambda raw: raw.hex().encode(), base64.b64encode])
@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_a_leak_would_be_found(encode: Any, before: bytes) -> None:
    secret = SECRETS["HF_TOKEN"]
    assert found(secret, {"log": b"\x00\xff" + encode(before + secret.encode() + before) + b"\n"}) == ["log"]
    assert found(secret, {"log": encode(before + secret.encode()[:-4])}) == []
