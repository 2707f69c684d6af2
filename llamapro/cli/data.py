"""Build, pack, verify and inspect datasets: text in, tokenized shards out."""

import argparse
import time
from pathlib import Path

from llamapro import console
from llamapro.cli import data_interop, which
from llamapro.data.dataset import Dataset
from llamapro.data.manifest import read_dataset_manifest
from llamapro.data.packing import ensure_pack
from llamapro.data.verify import verify_dataset
from llamapro.errors import CheckFailed

_SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="tokenize text into a dataset; an interrupted build continues"))
    pack = commands.add_parser("pack", help="plan the rows of a sequence length (training does it when it is missing)")
    pack.add_argument("folder", type=Path, help="dataset folder")
    pack.add_argument("--sequence-length", type=int, required=True, metavar="N", help="tokens per row")
    pack.add_argument(
        "--packing",
        choices=("bestfit", "concat", "document"),
        default="bestfit",
        help="bestfit: whole documents, rows filled as well as possible; concat: cut every N tokens; document: one "
        "document per row (default: %(default)s)",
    )
    verify = commands.add_parser("verify", help="read everything and compare it with its checksums")
    verify.add_argument("folder", type=Path, help="dataset folder")
    inspect = commands.add_parser("inspect", help="show what a dataset holds, with decoded samples")
    inspect.add_argument("folder", type=Path, help="dataset folder")
    data_interop.add_import_arguments(
        commands.add_parser("import-megatron", help="make a dataset of tokens that Megatron-LM's tools wrote")
    )
    data_interop.add_export_arguments(
        commands.add_parser("export-megatron", help="write a dataset's tokens for Megatron-LM")
    )
    which.add_arguments(commands.add_parser("which", help="show the documents that were in the steps of a run"))


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-command."""
    runs = {
        "build": _build,
        "pack": _pack,
        "verify": _verify,
        "inspect": _inspect,
        "import-megatron": data_interop.import_megatron,
        "export-megatron": data_interop.export_megatron,
        "which": which.which,
    }
    return runs[arguments.data_command](arguments)


def _add_build(parser: argparse.ArgumentParser) -> None:
    from data_tools import command

    command.add_arguments(parser)


def _build(arguments: argparse.Namespace) -> int:
    from data_tools import command

    return command.run(arguments)


def _pack(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    dataset = Dataset.open(arguments.folder)
    plan = ensure_pack(dataset, "train", arguments.sequence_length, arguments.packing, None)
    console.result(
        f"{plan.rows:,} rows of {plan.sequence_length:,} tokens, {plan.utilisation:.2%} of them used "
        f"({arguments.packing}, {time.monotonic() - start:.1f} s)"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    splits = read_dataset_manifest(arguments.folder).splits.values()
    tokens, documents = sum(s.tokens for s in splits), sum(s.documents for s in splits)
    with console.progress("verifying", tokens, unit="tokens") as advance:
        problems = verify_dataset(arguments.folder, advance)
    if problems:
        shown = [f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
        text = [
            f"{arguments.folder}: {len(problems)} problems",
            *shown,
            "restore the files from a copy, or build again",
        ]
        raise CheckFailed("\n".join(text))
    console.result(f"{arguments.folder} is whole: {documents:,} documents, {tokens:,} tokens, every byte checked")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from data_tools.inspect import facts_of, histogram_of, samples_of

    dataset = Dataset.open(arguments.folder)
    console.table(f"dataset {dataset.manifest.name}", ["fact", "value"], facts_of(dataset))
    console.table("\nlength", ["tokens", "documents", ""], histogram_of(dataset))
    for sample in samples_of(dataset):
        console.result(f"\n{sample.split} · {sample.file}, line {sample.row + 1} · {sample.tokens:,} tokens")
        console.result(sample.shown())
    return 0
