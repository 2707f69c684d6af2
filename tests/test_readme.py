"""The README is true: its commands parse, its configuration loads, and its chain of commands runs on a tiny model."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch

from llamapro.config.load import load_config
from tests.support.hidden import hide_package
from tests.support.models import TRAINING_TEXT, save_tiny_llama
from tests.support.source import ROOT

README = (ROOT / "README.md").read_text()
# What a tiny model on two CPU processes needs instead of what a reader's model on eight GPUs does.
TINY = {
    "--num_gpus 8": f"--num_gpus 2 --master_port {20000 + os.getpid() % 10000}",
    "--new-blocks 8": "--new-blocks 2",
    "--heldout 0.01": "--heldout 0.2",
    "sequence_length: 2048": "sequence_length: 64",
    "steps: 2000": "steps: 3",
    "global_sequences: 64": "global_sequences: 4",
}
NEEDS_A_CLUSTER = ("--hostfile", "sbatch")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]


def made() -> list[str]:
    """Targets of the `make` commands in indented blocks and in the text."""
    return re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE)


def parse(command: str) -> argparse.Namespace:
    """Parse one command line with the parser of the program that it calls."""
    words = shlex.split(command)
    if words[0] == "llamapro":
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"llamapro.cli.{words[1].replace('-', '_')}").add_arguments(parser)
        return parser.parse_args(words[2:])
    if words[0] == "deepspeed":
        from deepspeed.launcher import runner

        parsed = runner.parse_args(words[1:])
        assert (ROOT / parsed.user_script).is_file()
        assert parsed.user_args[0] == "--config"
        return argparse.Namespace(**vars(parsed))
    assert words[0] == "sbatch"
    assert (ROOT / next(word for word in words if word.endswith(".sbatch"))).is_file()
    return argparse.Namespace()


def test_there_is_something_to_test() -> None:
    assert len(commands()) >= 10
    assert {"quickstart", "test", "install"} <= set(made())


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    parse(command)


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse("llamapro expand a b --new-block-count 3")


@pytest.mark.parametrize("target", sorted(set(made())))
def test_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_linked_files_exist() -> None:
    local = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    named = re.findall(r"`((?:launch|docker|docs)/[^` ]+)`", README)
    assert [name for name in (*local, *named) if not (ROOT / name).exists()] == []


def test_configuration_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "law.yaml").write_text(text)
    config = load_config(tmp_path / "law.yaml", [])
    assert set(config.data.sources) == {"law", "general"}


def tiny(text: str) -> str:
    for large, small in TINY.items():
        text = text.replace(large, small)
    return text


def workplace(folder: Path) -> None:
    """A reader's folder: a base model, two texts, the configuration."""
    save_tiny_llama(folder / "path" / "to" / "base", dtype=torch.bfloat16)
    for name, step in (("law", 1), ("general", 2)):
        documents = [{"text": f"{number * step}. {TRAINING_TEXT[number % 4]}"} for number in range(60)]
        (folder / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    (folder / "law.yaml").write_text(tiny(blocks("yaml")[0]))
    (folder / "launch").symlink_to(ROOT / "launch")


def environment_of(program: str, folder: Path) -> dict[str, str]:
    """A reader's environment; a login node need not have deepspeed, so only the training's own commands see it."""
    path = str(ROOT) if program == "deepspeed" else f"{hide_package(folder / 'hidden', 'deepspeed')}:{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


def test_the_chain_of_commands_runs(tmp_path: Path) -> None:
    workplace(tmp_path)
    binaries = Path(sys.executable).parent
    for command in commands():
        if any(word in command for word in NEEDS_A_CLUSTER):
            continue
        name, *arguments = shlex.split(tiny(command))
        program = [sys.executable, "-m", "llamapro"] if name == "llamapro" else [str(binaries / name)]
        environment = environment_of(name, tmp_path)
        done = subprocess.run([*program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    run = tmp_path / "runs" / "law"
    assert orjson.loads((run / "evaluation" / "results.json").read_bytes())["changes"]
    assert "Retention: held-out text" in (run / "report.html").read_text()
