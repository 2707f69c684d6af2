"""The page about instruction tuning is true: its commands run one after another, its configuration is one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from data_tools.chat.library import template_names
from data_tools.chat.options import CHAT_FORMATS, LOSS_ON
from llamapro.cli.main import main
from llamapro.config.load import load_config
from tests.support.chats import TWO_ROUNDS, write_rows
from tests.support.models import save_tiny_llama
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "instruct.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_names_every_format_template_and_choice() -> None:
    for name in (*CHAT_FORMATS, *template_names(), *LOSS_ON):
        assert f"`{name}`" in PAGE, name


def test_the_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "path" / "to" / "model", dtype=torch.bfloat16)
    asked = [{"role": "user", "content": f"What is {number}?"} for number in range(300)]
    write_rows(tmp_path / "chats.jsonl", [{"messages": [question, TWO_ROUNDS[2]]} for question in asked])
    (configuration,) = blocks("yaml")
    (tmp_path / "instruct.yaml").write_text(configuration.replace("sequence_length: 2048", "sequence_length: 128"))
    for command in (line for block in blocks("bash") for line in block.splitlines()):
        program, *arguments = shlex.split(command)
        if program == "deepspeed":
            assert arguments[0] == "launch/sft.py"
            train([str(ROOT / arguments[0]), *arguments[1:], "--batch.global_sequences", "100"])
        elif program == "cp":
            shutil.copy(arguments[0], arguments[1])
        else:
            assert program == "llamapro"
            assert main(arguments) == 0, command
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "work" / "instruct")
    assert tokenizer.apply_chat_template(TWO_ROUNDS, tokenize=False).startswith("<|im_start|>system\nBe brief.")


def train(words: list[str]) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=180, env={**clean, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


def test_the_line_about_adapters_is_a_configuration(tmp_path: Path) -> None:
    (configuration,) = blocks("yaml")
    (line,) = [text for text in blocks("text") if text.startswith("model: ")]
    lines = [line.strip() if old.startswith("model: ") else old for old in configuration.splitlines()]
    (tmp_path / "instruct.yaml").write_text("\n".join(lines))
    model = load_config(tmp_path / "instruct.yaml").model
    assert model.trainable == "lora" and model.lora is not None and model.lora.rank == 16
