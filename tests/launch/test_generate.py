"""The proof that an export is plain: another process, transformers alone, nothing of this project."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.support.models import save_tiny_llama
from tests.support.source import ROOT, imports, modules

SCRIPT = ROOT / "launch" / "quickstart" / "generate.py"


def test_it_continues_text_with_each_model(tmp_path: Path) -> None:
    folders = [str(save_tiny_llama(tmp_path / name, blocks=2, seed=seed)) for seed, name in enumerate(("old", "new"))]
    command = [sys.executable, str(SCRIPT), "--prompt", "The quick", "--prompt", "In the", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["model"], line["prompt"]) for line in lines] == [
        (folder, prompt) for folder in folders for prompt in ("The quick", "In the")
    ]
    assert all(line["continuation"] for line in lines)


def test_it_imports_nothing_of_this_project() -> None:
    used = {one.target.partition(".")[0] for one in imports(modules()["launch.quickstart.generate"])}
    assert used == {"argparse", "json", "sys", "torch", "transformers"}
    assert ast.get_docstring(modules()["launch.quickstart.generate"].tree)
