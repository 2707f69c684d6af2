"""`llamapro export` as a user runs it, in an environment without deepspeed."""

import subprocess
import sys
from pathlib import Path

import pytest

from llamapro.cli.main import main
from tests.support.exports import TinyRun, make_run

WITHOUT_DEEPSPEED = (
    "import sys\n"
    "sys.modules['deepspeed'] = None\n"
    "from llamapro.cli.main import main\n"
    "code = main(sys.argv[1:])\n"
    "assert not any(name.startswith('llamapro.engine') for name in sys.modules)\n"
    "sys.exit(code)\n"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tiny"))


def test_export_runs_without_deepspeed_and_says_what_it_proved(tiny: TinyRun, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, "export", tiny.folder, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base = len(tiny.record.base_tensors)
    assert f"{base} of {base + len(tiny.masters)} tensors are the base's, bit for bit" in done.stdout
    assert f"hf upload YOUR_NAME/MODEL {tmp_path / 'out'}" in done.stderr


def test_the_checkpoint_is_found_from_the_run_and_an_error_is_one_message(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny.folder), str(tmp_path / "delta"), "--delta"]) == 0
    assert main(["export", str(tmp_path / "delta"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert main(["export", str(tmp_path / "delta"), str(tmp_path / "out"), "--base", str(tiny.base)]) == 0
