"""Prove what in a model is unchanged: base tensors bit for bit, fresh new blocks the identity.

Everything is compared with the record (expansion.json); with --base, the record also with the base's own files. What
the record lists as trained may differ, and is named. Exit code 1: something differs; the first tensors are named.
"""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.errors import CheckFailed, UserError
from llamapro.expansion.identity import identity_difference
from llamapro.expansion.record import ExpansionRecord
from llamapro.expansion.source import resolve_model
from llamapro.expansion.verify import VerifyReport, verify

SHOWN_PROBLEMS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a folder of `expand` or `export`")
    parser.add_argument("--base", help="the base model's folder or hub id, to compare with its own files too")
    parser.add_argument(
        "--identity",
        action="store_true",
        help="also compare logits with the base's, float32, with and without KV cache",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify; returns the exit code."""
    if arguments.identity and arguments.base is None:
        raise UserError("--identity compares logits with the base's; give it with --base")
    model = arguments.model
    if not model.is_dir():
        raise UserError(f"{model} is no folder; give one that `llamapro expand` or `llamapro export` wrote")
    base = None if arguments.base is None else resolve_model(arguments.base)
    report = verify(model, base)
    _show(model, report)
    if report.problems:
        raise CheckFailed(_message(model, report.problems))
    if arguments.identity and base is not None:
        _check_identity(model, base, report.record)
    return 0


def _show(model: Path, report: VerifyReport) -> None:
    rows = [
        (f"{len(result.problems)} wrong" if result.problems else "holds", result.covered, result.rule)
        for result in report.rules
    ]
    console.table(f"verify {model}", ("result", "covered", "rule"), rows)
    if trained := trained_sentence(report.record):
        console.result(f"Trained since the expansion, so exempt from the rules about content: {trained}.")


def trained_sentence(record: ExpansionRecord) -> str:
    """What a record lists as trained, in words; empty when nothing was."""
    parts = []
    if blocks := record.trained.blocks:
        new = sum(block in record.new_blocks for block in blocks)
        parts.append(f"{new} new and {len(blocks) - new} base blocks ({', '.join(map(str, blocks))})")
    if tensors := record.trained.tensors:
        parts.append(f"{len(tensors)} single tensors, first {tensors[0]}")
    return "; ".join(parts)


def _message(model: Path, problems: tuple[str, ...]) -> str:
    lines = [f"{model} is not what its record says: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    lines += [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if (more := len(problems) - SHOWN_PROBLEMS) > 0:
        lines.append(f"  … and {more} more")
    return "\n".join(lines)


def _check_identity(model: Path, base: Path, record: ExpansionRecord) -> None:
    if trained := trained_sentence(record):
        console.result(
            f"Identity was not compared: the model was trained ({trained}), so its logits differ on purpose."
        )
        return
    if problems := identity_difference(model, base):
        raise CheckFailed(_message(model, tuple(problems)))
    console.result("Identity holds: logits equal the base's bit for bit (float32, CPU), with and without KV cache.")
