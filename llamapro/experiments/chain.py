"""A chain: one method with one seed, through the public commands: expand, then train, export, measure, again and again.

An ablation is a chain of one training (and perhaps an instruction tuning), a sequence of tasks one of many.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import orjson

from llamapro import console
from llamapro.config.load import dump_config
from llamapro.config.root import RunConfig
from llamapro.engine.environment import cuda_possible
from llamapro.errors import CheckFailed
from llamapro.evaluation.benchmarks.store import BENCHMARKS_NAME, BenchmarkResults
from llamapro.evaluation.results import RESULTS_NAME, Results, read_results
from llamapro.evaluation.stored import Stored, write_stored
from llamapro.experiments.commands import deepspeed_command, llamapro_command, run_command
from llamapro.experiments.config import LaunchConfig, VariantConfig
from llamapro.experiments.results import Training, read_training
from llamapro.experiments.steps import Step, make
from llamapro.files.atomic import discard, write_atomic
from llamapro.run_folder import RunFolder
from llamapro.training.model_facts import Stage

Summary = TypeVar("Summary")


class Measured(Stored):
    """What a model was measured to be; None where nothing of the kind was asked for."""

    texts: Results | None
    benchmarks: BenchmarkResults | None


@dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Attributes:
        options: of `llamapro evaluate`.
        inputs: what the result depends on beside the model: the options and the texts' fingerprints.
    """

    options: tuple[str, ...]
    inputs: object


@dataclass(frozen=True)
class Phase:
    """One training of a chain.

    Attributes:
        sections: of the run configuration; all but run and model.
        trainable: what learns; None: as the method says.
        inputs: fingerprints of the datasets.
        evaluation: None: it is not measured.
    """

    name: str
    stage: Stage
    sections: Mapping[str, Any]
    trainable: str | None
    inputs: object
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Place:
    """Where an experiment works, and what its chains share."""

    folder: Path
    base: Path
    base_digest: str
    launch: LaunchConfig

    @property
    def evaluation(self) -> Path:
        """Where models are measured: the base's measurements are kept there and used again."""
        return self.folder / "evaluation"

    @property
    def stamps(self) -> Path:
        """What is done."""
        return self.folder / "steps"


@dataclass(frozen=True)
class Link:
    """A phase's steps and files."""

    run: RunFolder
    training: Path
    export: Path
    measured: Path
    exported: Step
    measure: Step | None


class Chain:
    """One method with one seed.

    Args:
        method: its name; `seed`: of the data order and of everything random.
    """

    def __init__(self, place: Place, method: str, variant: VariantConfig, seed: int, phases: Sequence[Phase]) -> None:
        self._place = place
        self.method, self.seed = method, seed
        self._variant = variant
        self.expansion = None if variant.expand is None else expansion(place, variant)
        self.links: list[Link] = []
        for phase in phases:
            self.links.append(self._link(phase))

    def make(self, *, keep: bool) -> None:
        """Train and measure what is not measured yet; whatever no later phase needs is removed unless kept."""
        for number, link in enumerate(self.links):
            if link.measure is None:
                continue
            make(link.measure)
            if not keep:
                discard(*(earlier.run.checkpoints for earlier in self.links[: number + 1]))
                discard(*(earlier.export for earlier in self.links[:number]))
        if not keep:
            discard(self.links[-1].export)

    @property
    def trainings(self) -> list[Training]:
        """What each phase took."""
        return [Training.model_validate_json(link.training.read_bytes()) for link in self.links]

    @property
    def measurements(self) -> list[Measured]:
        """What each measured phase came to."""
        measured = [link.measured for link in self.links if link.measure is not None]
        return [Measured.model_validate_json(path.read_bytes()) for path in measured]

    @property
    def _called(self) -> str:
        return f"{self.method}, seed {self.seed}"

    def _link(self, phase: Phase) -> Link:
        folder = self._place.folder / "runs" / self.method / f"seed-{self.seed}"
        name = f"{self.method}.{self.seed}.{phase.name}"
        run, export = RunFolder(folder / phase.name), folder / f"{phase.name}.model"
        training, measured = folder / f"{phase.name}.training.json", folder / f"{phase.name}.measured.json"
        strength = self._variant.strength
        options = () if strength is None else ("--strength", str(strength))
        command = llamapro_command("export", run.path, export, "--overwrite", *options)
        exported = Step(
            f"{name}.export",
            self._place.stamps,
            f"{self._called}: exporting after {phase.name}",
            outputs=(export,),
            inputs=[strength],
            work=lambda: run_command(command, {}),
            after=(self._train_step(phase, name, run, training),),
        )
        measure = self._measure_step(phase, name, exported, export, measured)
        return Link(run, training, export, measured, exported, measure)

    def _train_step(self, phase: Phase, name: str, run: RunFolder, training: Path) -> Step:
        before = self.links[-1] if self.links else None
        model = before.export if before else self._start()
        earlier = (before.exported,) if before else (self.expansion,) if self.expansion else ()
        config = self._configuration(phase, run.path, model)
        launch = self._place.launch

        def train() -> None:
            file = training.with_name(f"{phase.name}.yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, dump_config(config))
            run_command(front_command(phase.stage, launch, file), launch_environment())
            write_stored(training, read_training(run))

        return Step(
            f"{name}.train",
            self._place.stamps,
            f"{self._called}: training {phase.name}",
            outputs=(run.checkpoints, training),
            inputs=[
                phase.stage,
                config.model_dump(mode="json"),
                launch.model_dump(),
                self._place.base_digest,
                phase.inputs,
            ],
            work=train,
            after=earlier,
            scratch=(run.path,),
        )

    def _measure_step(self, phase: Phase, name: str, exported: Step, model: Path, measured: Path) -> Step | None:
        evaluation = phase.evaluation
        if evaluation is None:
            return None
        options = evaluation.options
        return Step(
            f"{name}.measure",
            self._place.stamps,
            f"{self._called}: measuring after {phase.name}",
            outputs=(measured,),
            inputs=evaluation.inputs,
            work=lambda: measure(self._place, model, options, measured),
            after=(exported,),
        )

    def _start(self) -> Path:
        return self.expansion.outputs[0] if self.expansion else self._place.base

    def _configuration(self, phase: Phase, run: Path, model: Path) -> RunConfig:
        trainable, lora = self._learning(phase)
        values = {
            **phase.sections,
            "run": {"folder": run, "seed": self.seed},
            "model": {"path": model, "trainable": trainable, "lora": lora},
            "validation": {"sets": {}},
            "checkpoint": {"keep": 1},
        }
        return RunConfig.model_validate(values)

    def _learning(self, phase: Phase) -> tuple[str, dict[str, Any] | None]:
        if phase.trainable is not None:
            return phase.trainable, None
        if self._variant.lora is not None:
            return "lora", self._variant.lora.model_dump()
        return ("new" if self._variant.expand is not None else "all"), None


def expansion(place: Place, variant: VariantConfig) -> Step:
    """The step that adds a variant's blocks to the base; the same one for all variants that add the same."""
    expand = variant.expand
    assert expand is not None
    settings = expand.model_dump(mode="json")
    name = f"{expand.new_blocks}-blocks-{sha256(orjson.dumps(settings)).hexdigest()[:8]}"
    target = place.folder / "expanded" / name
    words: list[str | Path] = ["expand", place.base, target, "--overwrite", "--base-id", place.base.name]
    words += ["--new-blocks", str(expand.new_blocks), "--placement", expand.placement]
    words += ["--copies-per-group", str(expand.copies_per_group)]
    if expand.probe is not None:
        words += ["--probe", expand.probe]
    return Step(
        f"expand.{name}",
        place.stamps,
        f"adding {expand.new_blocks} blocks, {expand.placement}",
        outputs=(target,),
        inputs=[place.base_digest, settings],
        work=lambda: run_command(llamapro_command(*words), {}),
    )


def measure(place: Place, model: Path, options: Sequence[str], target: Path) -> None:
    """Run `llamapro evaluate` on a model against the base and keep what it wrote."""
    results, benchmarks = place.evaluation / RESULTS_NAME, place.evaluation / BENCHMARKS_NAME
    discard(results, benchmarks)
    run_command(
        llamapro_command(
            *("evaluate", model, "--compare", place.base, "--output", place.evaluation),
            *("--detail-sequences", "0", *options),
        ),
        {},
    )
    measured = Measured(
        texts=read_results(place.evaluation),
        benchmarks=BenchmarkResults.model_validate_json(benchmarks.read_bytes()) if benchmarks.is_file() else None,
    )
    write_stored(target, measured)


def front_command(stage: Stage, launch: LaunchConfig, config: Path) -> list[str]:
    """The command line that trains, as a user would write it."""
    found = find_spec("llamapro.launch")
    if found is None or not found.submodule_search_locations:
        raise CheckFailed("the training programs are not installed: llamapro.launch is missing; install llamapro")
    front = Path(found.submodule_search_locations[0]) / f"{stage}.py"
    if launch.launcher == "deepspeed":
        return deepspeed_command(front, launch.processes, "--config", config)
    return [sys.executable, str(front), "--config", str(config)]


def launch_environment() -> dict[str, str]:
    """What the launcher needs to know of a machine without GPUs."""
    return {} if cuda_possible() else {"DS_ACCELERATOR": "cpu"}


def make_chains(
    chains: Sequence[Chain],
    *,
    keep: bool,
    results: Callable[[Sequence[Chain], Mapping[str, str]], Summary],
    write: Callable[[Summary], None],
) -> Summary:
    """Make every chain; one that fails is named, with the reason, and the others go on.

    Args:
        results: what the chains made so far came to, and what failed: "method, seed" and why, which is said at the end
            only.
        write: writes the results, after each chain that succeeded and at the end.

    Returns:
        The results at the end.

    Raises:
        CheckFailed: every chain failed.
        RetryLater: interrupted; the same call continues.
    """
    made: list[Chain] = []
    failed: dict[str, str] = {}
    for number, chain in enumerate(chains):
        called = f"{chain.method}, seed {chain.seed}"
        console.info(f"[{number + 1}/{len(chains)}] {called}")
        try:
            chain.make(keep=keep)
        except CheckFailed as error:
            failed[called] = str(error)
            console.warning(f"{called} failed; the others go on: {error}")
        else:
            made.append(chain)
            write(results(made, {}))
        later = {other.expansion.name for other in chains[number + 1 :] if other.expansion}
        if chain.expansion is not None and not keep and chain.expansion.name not in later:
            discard(*chain.expansion.outputs)
    if not made:
        raise CheckFailed("everything failed:\n" + "\n".join(failed.values()))
    final = results(made, failed)
    write(final)
    return final
