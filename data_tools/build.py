"""Build a dataset: plan, tokenize units, seal shards, write the manifest. Every step can be killed and continues.

The output's bytes depend on the inputs, the options and the tokenizer only: not on the number of workers, the order in
which they finish, or how often the build was interrupted.
"""

import errno
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from data_tools.chat.detect import resolve_format
from data_tools.chat.library import chat_options
from data_tools.chat.options import ChatFormat, ChatOptions
from data_tools.decontaminate import LEAST_WORDS, EvaluationIndex
from data_tools.encode import encode_unit
from data_tools.encoded import Encoded
from data_tools.encoders import TokenizersEncoder
from data_tools.fim import fim_options
from data_tools.inputs import find_inputs, plan_units, with_text_column
from data_tools.parity import choose_library
from data_tools.places import require_shared_files
from data_tools.plan import BUILD_FORMAT, BuildPlan, ContentOptions, TokenizerFacts, shard_count
from data_tools.pool import StartPool, WorkerPool, worker_pool
from data_tools.readers import Document, Item, Reject, read_unit
from data_tools.rejects import require_few_rejects
from data_tools.request import BuildRequest
from data_tools.sealing import seal_dataset
from data_tools.tokenizer import locate_tokenizer, read_tokenizer, special_texts, token_ids, tokenizer_file
from data_tools.work import WORK_FOLDER, UnitEntry, Work
from llamapro import console
from llamapro.data.manifest import DatasetManifest, read_dataset_manifest
from llamapro.errors import DataError, UserError
from llamapro.files.atomic import remove_tree
from llamapro.files.disk import require_free_space
from llamapro.files.lock import RunLock
from llamapro.files.manifest import MANIFEST_NAME

SAMPLED_DOCUMENTS = 2000
SAMPLED_BYTES = 4 << 20
_SAMPLED_UNITS = 20
# Stored ids while both the work and the shards exist: at most 4 bytes for about 3 bytes of text, twice.
_SPACE_PER_TEXT_BYTE = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_dataset(request: BuildRequest, start_pool: StartPool = worker_pool) -> DatasetManifest:
    """Build the dataset, continue a build that was interrupted, or find it already built.

    Args:
        start_pool: starts the workers; processes of this one unless said otherwise.

    Raises:
        DataError: inputs, tokenizer or rows that can't be used; an unfinished or finished build of something else.
        RetryLater: a worker was killed; the same command continues.
    """
    plan = make_plan(request)
    work = Work(request.output / WORK_FOLDER)
    if (request.output / MANIFEST_NAME).exists():
        return _already_built(request, plan)
    _prepare_output(request.output)
    _require_space(request.output, plan, work)
    samples = _sampled_texts(plan)
    _require_evaluation_items(plan)
    with _full_disk_explained(request.output):
        work.folder.mkdir(parents=True, exist_ok=True)
        with RunLock(work.folder):
            manifest = _build(request, plan, work, samples, start_pool)
    remove_tree(work.folder)
    return manifest


def _build(
    request: BuildRequest, plan: BuildPlan, work: Work, samples: Sequence[str], start_pool: StartPool
) -> DatasetManifest:
    work.adopt(plan)
    folder = plan.tokenizer_folder
    path = tokenizer_file(folder)
    chat = plan.options.chat is not None
    library = TokenizersEncoder.library if chat else choose_library(path, samples, special_texts(folder))
    with start_pool(request.workers) as pool:
        require_shared_files(work, plan, pool)
        entries = _encode_all(work, plan, library, pool)
        require_few_rejects(plan, entries, request.max_reject_fraction)
        return seal_dataset(request, plan, work, entries, library, pool)


def _require_evaluation_items(plan: BuildPlan) -> None:
    """Notice before the work begins what can't be read, or not be looked for, in evaluation files."""
    if not plan.evaluation_files:
        return
    index = EvaluationIndex(plan.evaluation_files)
    if index.items == index.too_short:
        raise DataError(f"--decontaminate: none of the {index.items:,} items has {LEAST_WORDS} words to look for")
    if index.too_short:
        console.warning(
            f"--decontaminate: {index.too_short:,} of {index.items:,} evaluation items have no text of {LEAST_WORDS} "
            "words and can't be looked for"
        )


def make_plan(request: BuildRequest) -> BuildPlan:
    """Decide everything about a build before it starts."""
    folder = locate_tokenizer(request.tokenizer)
    tokenizer = read_tokenizer(folder)
    files = find_inputs(request.inputs, None)
    form = resolve_format(request.chat.format, files, request.text_field)
    if form is None:
        files = with_text_column(files, request.text_field)
    chat = _chat_options(request, form, folder, tokenizer)
    if chat is not None:  # the template itself writes BOS and EOS
        tokenizer = tokenizer.model_copy(update={"bos_inserted": False, "eos_inserted": False})
    options = ContentOptions(
        text_field=request.text_field,
        split=request.split,
        heldout=request.heldout,
        fim=fim_options(request.fim, token_ids(folder), request.tokenizer) if request.fim.rate else None,
        dedup=request.dedup,
        contaminated=request.contaminated if request.decontaminate else "unchecked",
        chat=chat,
    )
    shards = shard_count(sum(file.text_bytes for file in files))
    return BuildPlan(
        build_format=BUILD_FORMAT,
        files=files,
        units=plan_units(files, options),
        options=options,
        tokenizer=tokenizer,
        tokenizer_folder=folder,
        evaluation_files=find_inputs(request.decontaminate, None, "--decontaminate") if request.decontaminate else (),
        shards={"train": shards, "heldout": math.ceil(shards * options.heldout)},
    )


def _chat_options(
    request: BuildRequest, form: ChatFormat | None, folder: Path, tokenizer: TokenizerFacts
) -> ChatOptions | None:
    if form is None:
        if ignored := request.chat.ignored_by_text():
            console.warning(f"{', '.join(ignored)} has no effect: the inputs hold text, not conversations")
        return None
    if request.fim.rate:
        raise UserError(f"--fim-rate {request.fim.rate:g} is for text, and the inputs hold conversations ({form})")
    return chat_options(request.chat, form, folder, tokenizer)


def _already_built(request: BuildRequest, plan: BuildPlan) -> DatasetManifest:
    output = request.output
    manifest = read_dataset_manifest(output)
    if manifest.plan != plan.digest():
        raise UserError(
            f"{output} already holds a finished dataset that was built from other inputs, options or tokenizer; choose "
            "another --output, or delete it"
        )
    work = Work(output / WORK_FOLDER)
    if work.folder.exists():
        remove_tree(work.folder)
    console.info(f"{output} is already built; nothing to do")
    if request.license and request.license != manifest.license:
        console.warning(
            f"{output} keeps its licence {manifest.license!r}; to record another, delete it and build again"
        )
    return manifest


def _prepare_output(output: Path) -> None:
    """An output folder is new, empty, or holds an unfinished build."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / WORK_FOLDER).is_dir():
        raise UserError(f"--output {output} is not empty and holds no dataset; choose another folder")


def _require_space(output: Path, plan: BuildPlan, work: Work) -> None:
    """Refuse to begin what the disk can't hold; what an interrupted build wrote there already is not needed again."""
    needed = sum(file.text_bytes for file in plan.files) * _SPACE_PER_TEXT_BYTE
    written = sum(path.stat().st_size for path in work.folder.rglob("*.bin"))
    require_free_space(output, needed - written, "the dataset")


@contextmanager
def _full_disk_explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"--output {output} can't grow: {error.strerror}; what is finished is kept: make room there and run the "
            "same command again"
        ) from error


def _sampled_texts(plan: BuildPlan) -> list[str]:
    """Documents from units spread over the inputs.

    Raises:
        DataError: there is none, so that a wrong option is noticed before anything is written.
    """
    step = max(1, len(plan.units) // _SAMPLED_UNITS)
    units = plan.units[::step]
    texts: list[str] = []
    reasons: Counter[str] = Counter()

    def usable(items: Iterable[Item]) -> Iterator[str]:
        for item in items:
            if isinstance(item, Document):
                yield item.text
            elif isinstance(item, Reject):
                reasons[item.reason] += 1

    for unit in units:
        items = read_unit(unit, plan.files[unit.file], plan.options)
        texts.extend(_limited(usable(items), SAMPLED_DOCUMENTS // len(units), SAMPLED_BYTES // len(units)))
    if not texts:
        raise DataError(f"the inputs hold no usable document: {_as_text(reasons, plan.options)}")
    return texts


def _as_text(reasons: Counter[str], options: ContentOptions) -> str:
    if not reasons:
        return "they are empty"
    counted = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
    return f"{counted}. Name the right {options.flag_of_rows}, or correct the inputs"


def _limited(texts: Iterator[str], count: int, characters: int) -> Iterator[str]:
    for text in islice(texts, count):
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _encode_all(work: Work, plan: BuildPlan, library: str, pool: WorkerPool) -> Sequence[UnitEntry]:
    entries = {unit.index: work.entry(unit.index) for unit in plan.units}
    missing = [unit for unit in plan.units if entries[unit.index] is None]
    if len(missing) < len(plan.units):
        console.info(f"continuing: {len(plan.units) - len(missing):,} of {len(plan.units):,} units are done")
    encoded = Encoded([entry for entry in entries.values() if entry is not None])
    total = sum(unit.text_bytes for unit in missing)
    with console.progress("tokenizing", total, "bytes", encoded.described) as advance:

        def done(entry: UnitEntry) -> None:
            entries[entry.unit] = entry
            encoded.add(entry)
            advance(plan.units[entry.unit].text_bytes)

        pool.run_all([partial(encode_unit, work.folder, library, unit.index) for unit in missing], done)
    return [entry for entry in entries.values() if entry is not None]


if __name__ == "__main__":
    from data_tools.command import main

    sys.exit(main())
