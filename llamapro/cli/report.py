"""Write a run as one self-contained HTML page; several runs are laid over each other in one page."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from llamapro import console
from llamapro.config.yaml_file import read_yaml
from llamapro.data.dataset import Dataset
from llamapro.errors import LlamaproError, UserError
from llamapro.report.facts import Sample, SampleGroup
from llamapro.report.page import OVERLAY_NAME, write_overlay, write_report
from llamapro.run_folder import RunFolder

SHOWN_CHARACTERS = 600
SHOWN_PARTS = 6
WRITTEN = {"model", "prompt", "continuation"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; several are compared")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"page to write (RUN/report.html; of several runs {OVERLAY_NAME} in the first)",
    )
    parser.add_argument(
        "--evaluation", type=Path, metavar="DIR", help="results of `llamapro evaluate` to show (RUN/evaluation)"
    )
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help='texts that models wrote, to show: JSON lines {"model": …, "prompt": …, "continuation": …}',
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    if arguments.output is not None and arguments.output.suffix != ".html":
        raise UserError(f"--output {arguments.output}: give a file whose name ends in .html")
    if len(arguments.runs) == 1:
        (folder,) = arguments.runs
        samples = tuple(_samples(folder, arguments.samples))
        path = write_report(folder, arguments.output, evaluation=arguments.evaluation, samples=samples)
    else:
        for option in ("evaluation", "samples"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} is for the page of one run; give one RUN")
        path = write_overlay(arguments.runs, arguments.output)
    console.result(str(path))
    return 0


def _samples(run: Path, written: Path | None) -> Iterator[SampleGroup]:
    if shown := tuple(_seen(run)):
        note = "The beginning of one training document of each source; what is learned is marked where not all is."
        yield SampleGroup("Seen in training", shown, note)
    if written is not None:
        yield SampleGroup("Written by models", tuple(_written(written)))


def _seen(run: Path) -> Iterator[Sample]:
    """One document of each source whose dataset is still where the run found it, always the same one."""
    from data_tools.inspect import samples_of

    config = RunFolder(run).config_file
    sources = (read_yaml(config).values.get("data") or {}).get("sources") or {} if config.is_file() else {}
    for name, source in sources.items():
        folder = Path(source["path"])
        if not folder.is_dir():
            continue
        try:
            documents = [one for one in samples_of(Dataset.open(folder), 1) if one.split == "train"]
        except (LlamaproError, OSError) as error:
            yield Sample(name, f"can't be shown: {error}", ())
            continue
        for one in documents:
            yield Sample(name, f"{one.file}, row {one.row:,}, {one.tokens:,} tokens", _parts(one.text, one.parts))


def _parts(text: str, parts: Sequence[tuple[str, bool]] | None) -> tuple[tuple[str, bool], ...]:
    """The beginning of a document; of a conversation, its first parts, long ones cut so that several are seen."""
    if parts is None:
        return ((_cut(text.strip(), SHOWN_CHARACTERS), False),)
    return tuple((_cut(part, SHOWN_CHARACTERS // 2), learned) for part, learned in parts[:SHOWN_PARTS])


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}…"


def _written(path: Path) -> Iterator[Sample]:
    try:
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--samples {path} can't be read as JSON lines: {error}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not line.keys() >= WRITTEN:
            raise UserError(f"--samples {path}, line {number}: expected an object with {', '.join(sorted(WRITTEN))}")
        prompt, continuation = str(line["prompt"]), str(line["continuation"])
        yield Sample(Path(str(line["model"])).name, "", ((prompt, False), (continuation, True)))
