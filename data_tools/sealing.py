"""The end of a build: shards, tokenizer and rejects put in place, then the manifest, which makes it a dataset."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

import llamapro
from data_tools.chat.library import TEMPLATE_FILE
from data_tools.decontaminate import CONTAMINATED, finished_line
from data_tools.dedup import find_all_duplicates
from data_tools.encoders import library_version
from data_tools.plan import BuildPlan
from data_tools.pool import WorkerPool
from data_tools.rejects import NO_DUPLICATES, reject_counts, rejects_file
from data_tools.request import BuildRequest
from data_tools.seal import RowCounter, SealedShard, seal_shard
from data_tools.tokenizer import tokenizer_files
from data_tools.work import CONTAMINATION_NAME, UnitEntry, Work
from llamapro import console
from llamapro.data.dataset import SHARDS_FOLDER, TOKENIZER_FOLDER
from llamapro.data.manifest import (
    DIGEST_ALGORITHM,
    DatasetManifest,
    SourceFile,
    SplitEntry,
    fingerprint_of,
    write_dataset_manifest,
)
from llamapro.data.shard import SplitName, TokenizationFacts
from llamapro.files.atomic import commit_folder, staged_file, staged_folder, write_atomic
from llamapro.files.manifest import FileEntry, describe_files

REJECTS_NAME = "rejects.jsonl"
SPLITS: tuple[SplitName, ...] = ("train", "heldout")


def seal_dataset(
    request: BuildRequest, plan: BuildPlan, work: Work, entries: Sequence[UnitEntry], library: str, pool: WorkerPool
) -> DatasetManifest:
    """Write the shards and everything else of the dataset; it exists when this returns."""
    output = request.output
    _take_back_shards(output, work)
    duplicates = find_all_duplicates(plan, work, pool) if plan.options.dedup == "exact" else NO_DUPLICATES
    sealed = _seal_shards(plan, work, pool)
    with staged_folder(output / TOKENIZER_FOLDER, overwrite=True) as staging:
        for path in tokenizer_files(plan.tokenizer_folder):
            shutil.copyfile(path, staging / path.name)
        if plan.options.chat is not None:
            (staging / TEMPLATE_FILE).write_text(plan.options.chat.template, encoding="utf-8")
    write_atomic(output / REJECTS_NAME, rejects_file(plan, entries, duplicates))
    contaminated = _write_contamination(output, plan, work, entries)
    splits = {name: _split_entry([part for part in sealed if part.split == name]) for name in SPLITS}
    manifest = DatasetManifest(
        **{name: getattr(plan.tokenizer, name) for name in TokenizationFacts.model_fields},
        name=output.resolve().name,
        fingerprint=fingerprint_of(splits),
        license=request.license,
        heldout_fraction=plan.options.heldout,
        tokenizer_sha256=plan.tokenizer.sha256,
        encoder=library_version(library),
        options=plan.options.stated() | _evaluation_names(plan) | _cut(entries),
        source_files=tuple(SourceFile(name=f.name, size=f.size, digest=f.digest) for f in plan.files),
        rejects=reject_counts(entries, duplicates) | contaminated,
        splits=splits,
        plan=plan.digest(),
        tool_version=llamapro.__version__,
    )
    files = _files(output / TOKENIZER_FOLDER) | {f"{SHARDS_FOLDER}/{part.entry.file}": part.file for part in sealed}
    commit_folder(work.shards, output / SHARDS_FOLDER)
    write_dataset_manifest(output, manifest, files)
    return manifest


def _evaluation_names(plan: BuildPlan) -> dict[str, str]:
    names = ", ".join(file.name for file in plan.evaluation_files)
    return {"decontaminate": names} if names else {}


def _cut(entries: Sequence[UnitEntry]) -> dict[str, str]:
    """How many conversations were cut, where some were."""
    conversations, tokens = sum(entry.cut for entry in entries), sum(entry.cut_tokens for entry in entries)
    return {"cut_conversations": str(conversations), "cut_tokens": str(tokens)} if conversations else {}


def _write_contamination(output: Path, plan: BuildPlan, work: Work, entries: Sequence[UnitEntry]) -> dict[str, int]:
    """List the documents that hold text of evaluation items; returns how many were left out for it, by reason."""
    if not plan.evaluation_files:
        return {}
    counter = RowCounter(plan)
    with staged_file(output / CONTAMINATION_NAME) as staging, staging.open("wb") as report:
        for entry in entries:
            first_row = counter.first_row(entry.unit, entry.rows)
            name = plan.files[plan.units[entry.unit].file].name
            if entry.contaminated:
                with work.contamination(entry.unit).open("rb") as lines:
                    report.writelines(finished_line(line, name, first_row, plan.evaluation_files) for line in lines)
    found = sum(entry.contaminated for entry in entries)
    if plan.options.contaminated == "report":
        console.warning(f"{found:,} documents hold text of evaluation items (kept; listed in {CONTAMINATION_NAME})")
        return {}
    return {CONTAMINATED: found} if found else {}


def _take_back_shards(output: Path, work: Work) -> None:
    """A build that was killed between its last two steps had its shards in place, but was no dataset yet."""
    if (output / SHARDS_FOLDER).exists() and not work.shards.exists():
        (output / SHARDS_FOLDER).rename(work.shards)


def _seal_shards(plan: BuildPlan, work: Work, pool: WorkerPool) -> list[SealedShard]:
    work.shards.mkdir(exist_ok=True)
    calls = [partial(seal_shard, work.folder, split, shard) for split in SPLITS for shard in range(plan.shards[split])]
    sealed: list[SealedShard] = []
    with console.progress("sealing", len(calls), unit="shards") as advance:

        def done(part: SealedShard) -> None:
            sealed.append(part)
            advance(1)

        pool.run_all(calls, done)
    return sorted(sealed, key=lambda part: part.entry.file)


def _split_entry(parts: Sequence[SealedShard]) -> SplitEntry:
    width = max((len(part.length_histogram) for part in parts), default=0)
    counts = np.zeros(width, dtype=np.int64)
    for part in parts:
        counts[: len(part.length_histogram)] += np.array(part.length_histogram, dtype=np.int64)
    shards = tuple(
        part.entry.model_copy(update={"file": f"{SHARDS_FOLDER}/{part.entry.file}"})
        for part in parts
    )  # fmt: skip
    return SplitEntry(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        length_histogram=tuple(counts.tolist()),
        shards=shards,
    )


def _files(folder: Path) -> dict[str, FileEntry]:
    found = describe_files(folder, DIGEST_ALGORITHM)
    return {f"{folder.name}/{name}": entry for name, entry in found.items()}
