"""The page about speed and memory says what the code assumes, and names what exists."""

import argparse
import re
from pathlib import Path

import pytest

from benchmarks.train_gpu import _parser as train_gpu_parser
from llamapro.cli.plan import add_arguments
from llamapro.planning import time
from llamapro.planning.plan import RESERVED_FRACTION

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("{:g} of the peak: 720", time.MATRIX_EFFICIENCY),
        ("{:g} of the peak forward", time.ATTENTION_FORWARD_EFFICIENCY),
        ("and {:.2f} backward: Flash", time.ATTENTION_BACKWARD_EFFICIENCY),
        ("{:g} of the memory's bandwidth", time.MEMORY_EFFICIENCY),
        ("{:g} times the bytes it keeps forward", time.GLUE_FORWARD),
        ("{:g} times backward when fused", time.GLUE_BACKWARD),
        ("{:g} times as much operation by operation", time.EAGER_GLUE),
        ("{:g} times as fast as in bf16", time.FP8_SPEEDUP),
        ("up to {:g}, send over NVLink", time.GPUS_PER_MACHINE),
        ("beyond that at {:g} GB/s", time.NETWORK_BANDWIDTH / 1e9),
        ("{:g} % of a device is kept free", 100 * RESERVED_FRACTION),
    ],
)
def test_every_assumption_is_the_codes(words: str, value: float) -> None:
    assert words.format(value) in PAGE


def test_every_option_exists() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = parser.format_help() + train_gpu_parser().format_help() + "--dry-run --num_gpus"
    named = set(re.findall(r"--[a-z][a-z0-9_-]+", PAGE))
    assert len(named) > 8 and all(option in known for option in named), named


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links and all((Path(__file__).parents[2] / "docs" / link).exists() for link in links)
