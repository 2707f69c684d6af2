"""Whatever stands in a file that we parse, only our own errors come out of it, and soon.

Files are made in three ways: any bytes, sound files with bytes changed, and sound JSON with any value in any place.
What was found once stays as a case of its own.
"""

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamapro.checkpoint.folder import open_checkpoint, read_checked_manifest, read_checkpoint
from llamapro.checkpoint.save import save_checkpoint
from llamapro.config.load import load_config
from llamapro.data.loader import StageUse
from llamapro.data.manifest import read_dataset_manifest
from llamapro.errors import LlamaproError
from llamapro.expansion.expand import expand
from llamapro.expansion.record import read_record
from llamapro.export.history import read_history
from llamapro.files.tensors import TensorFolder
from llamapro.ranks import Ranks
from llamapro.training.progress import Progress
from llamapro.training.resume import RunIdentity
from llamapro.training.trainer_state import TrainerState, saved_state
from tests.checkpoint.test_discover import reseal
from tests.support.checkpoint import SlicedState, random_values
from tests.support.config import minimal_values
from tests.support.data import write_dataset
from tests.support.models import save_tiny_llama

SECONDS = 1.0  # for a few KiB
QUICK = settings(max_examples=25, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=1000, derandomize=False, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
EDGES = st.sampled_from(
    [-1, 0, 1 << 31, 1 << 63, 10**30, 1e308, -0.0, "", "\0", "../../x", "/etc/passwd", [], {}, None]
)
YAML_PIECES = st.sampled_from(
    [
        *("model:", "data:", "run:", "  path: x", "  sources:", "- a", ": ", "&a ", "*a", "<<: *a"),
        *("!!python/name:os.system ", "!!set {a}", "!!omap [a: 1]", "=", "1:30", "!!binary AA", "2001-01-01", "0o7"),
        *("{", "}", "[", "]", "? ", "| ", "> ", "---", "...", "%YAML 1.1", "\t", "'", '"'),
        *("~", ".inf", ".nan", "1e999", "# x", "é", "\ufeff", "\x07", "\u2028"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A file that we parse: where it lies in a sound folder, and everything that reads it."""

    name: str
    read: Callable[[Path], object]


def read_sealed_checkpoint(folder: Path) -> None:
    """Read a checkpoint whose manifest was made to agree with its files."""
    reseal(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.record()
    saved_state(checkpoint)


def read_checkpoint_manifest(folder: Path) -> None:
    read_checkpoint(folder, read_checked_manifest(folder))


STEP = "step-00000010"
KINDS = {
    "configuration": Kind("run.yaml", lambda folder: load_config(folder / "run.yaml")),
    "run folder": Kind("run.yaml", lambda folder: read_as_run(folder)),
    "checkpoint manifest": Kind(f"{STEP}/manifest.json", lambda folder: read_checkpoint_manifest(folder / STEP)),
    "index": Kind(f"{STEP}/index.json", lambda folder: read_sealed_checkpoint(folder / STEP)),
    "state": Kind(f"{STEP}/state.json", lambda folder: read_sealed_checkpoint(folder / STEP)),
    "record": Kind("model/expansion.json", lambda folder: read_record(folder / "model")),
    "copy of the record": Kind("model/config.json", lambda folder: read_record(folder / "model")),
    "dataset manifest": Kind("data/manifest.json", lambda folder: read_dataset_manifest(folder / "data")),
    "weights": Kind("model/model.safetensors", lambda folder: TensorFolder.open(folder / "model")),
}  # fmt: skip


def read_as_run(folder: Path) -> None:
    shutil.copy(folder / "run.yaml", folder / "config.yaml")
    read_history(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each, as we write them."""
    folder = tmp_path_factory.mktemp("sound")
    save_tiny_llama(folder / "base", blocks=2)
    expand(str(folder / "base"), folder / "model", new_blocks=1)
    state = SlicedState(random_values(1))
    save_checkpoint(folder, 10, state, trainer_state(), read_record(folder / "model"), Ranks.solo())
    write_dataset(folder / "data", [[[3, 4, 5]]])
    (folder / "run.yaml").write_bytes(orjson.dumps(minimal_values()))
    return folder


def trainer_state() -> dict[str, Any]:
    identity = RunIdentity(
        model="m",
        trainable="4",
        seed=1,
        sequence_length=8,
        packing="bestfit",
        sources={"law": "f"},
        share_kind="weight",
        shares={"law": 1.0},
        planned_stages=(),
        global_sequences=2,
        steps=10,
        schedule={"learning_rate": 1e-3},
        optimizer={"eps": 1e-8},
    )
    stage = StageUse(from_sequence=0, weights={"law": 1.0}, taken={"law": 0})
    return TrainerState(progress=Progress(step=10), identity=identity, stages=(stage,), guard={}).to_json()


def read_only_with_our_errors(sound: Path, kind: str, content: bytes) -> None:
    """Put a file in the place of a sound one, read, put the sound one back."""
    path = sound / KINDS[kind].name
    seal = sound / STEP / "manifest.json"
    original, sealed, began = path.read_bytes(), seal.read_bytes(), time.process_time()
    path.write_bytes(content)
    try:
        KINDS[kind].read(sound)
    except LlamaproError as error:
        assert str(error)
    finally:
        seal.write_bytes(sealed)
        path.write_bytes(original)
    assert time.process_time() - began < SECONDS * (1 + len(content) / 4096)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def any_bytes(sound: Path, kind: str, data: st.DataObject) -> bytes:
    return data.draw(st.binary(max_size=2000))


def changed_bytes(sound: Path, kind: str, data: st.DataObject) -> bytes:
    """Bytes replaced, left out or put in."""
    content = bytearray((sound / KINDS[kind].name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        low = data.draw(st.integers(0, len(content)))
        content[low : low + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    return bytes(content)


def changed_values(sound: Path, kind: str, data: st.DataObject) -> bytes:
    """Any JSON in any place; of YAML and of lines, too: both contain JSON."""
    name = KINDS[kind].name
    content = (sound / name).read_bytes()
    if not name.endswith((".json", ".yaml")):
        return any_bytes(sound, kind, data)
    document = orjson.loads(content)
    path = data.draw(st.sampled_from(list(places(document))))
    try:
        return orjson.dumps(replaced(document, path, data.draw(JSON | EDGES)))
    except TypeError:  # an integer that JSON writers of ours never write
        return orjson.dumps(document).replace(b"1", str(10**30).encode(), 1)


def yaml_pieces(sound: Path, kind: str, data: st.DataObject) -> bytes:
    pieces = data.draw(st.lists(YAML_PIECES | st.text(max_size=5), max_size=25))
    return data.draw(st.sampled_from(["\n", "", "\n  "])).join(pieces).encode("utf-8", "surrogatepass")


WAYS = {"any bytes": any_bytes, "changed bytes": changed_bytes, "changed values": changed_values, "yaml": yaml_pieces}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(sound: Path, kind: str) -> None:
    check_hostile_files(sound, kind, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_hostile_files(sound: Path, kind: str) -> None:
    check_hostile_files(sound, kind, LONG)


def check_hostile_files(sound: Path, kind: str, how_many: settings) -> None:
    @how_many
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        way = data.draw(st.sampled_from(sorted(WAYS)))
        read_only_with_our_errors(sound, kind, WAYS[way](sound, kind, data))

    check()


def test_the_sound_files_are_read_and_an_error_of_another_kind_would_be_noticed(sound: Path) -> None:
    for kind in KINDS.values():
        kind.read(sound)
    with pytest.raises(UnicodeDecodeError):
        path = sound / "run.yaml"
        read_only_with_our_errors_of(lambda folder: path.write_bytes(b"\xff") and path.read_text(), sound)


def read_only_with_our_errors_of(read: Callable[[Path], object], sound: Path) -> None:
    KINDS["own"] = Kind("run.yaml", read)
    try:
        read_only_with_our_errors(sound, "own", b"{}")
    finally:
        del KINDS["own"]


DEEP = b"[" * 20_000 + b"]" * 20_000
TEN_TIMES = b"a%d: &a%d [" + b", ".join([b"*a%d"] * 10) + b"]\n"
CASES: list[tuple[str, bytes]] = [
    *((kind, DEEP) for kind in KINDS),
    *((kind, b'{"a":' * 20_000 + b"1" + b"}" * 20_000) for kind in KINDS),
    *((kind, b"[" + b"9" * 5000 + b"]") for kind in KINDS),
    *((kind, b"") for kind in KINDS),
    # Each line ten times the one before: harmless while nothing is copied.
    ("configuration", b"a0: &a0 [x]\n" + b"".join(TEN_TIMES % (n, n, *[n - 1] * 10) for n in range(1, 12))),
    ("configuration", b"run: &a {x: *a}\n"),
    ("configuration", b"run: !!python/object/apply:os.system [true]\n"),
    ("copy of the record", b'{"llamapro": 5}'),
    ("copy of the record", b'{"llamapro": null}'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content"), CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_files_that_were_made_by_hand(sound: Path, kind: str, content: bytes) -> None:
    read_only_with_our_errors(sound, kind, content)


@pytest.mark.parametrize("step", [[], {}, "10", None, 10.5, True, 11])
def test_a_manifest_that_is_confused_about_its_step(sound: Path, step: object) -> None:
    document = orjson.loads((sound / "step-00000010/manifest.json").read_bytes())
    content = orjson.dumps(document | {"facts": {"step": step}})
    (sound / "copy").mkdir(exist_ok=True)
    read_only_with_our_errors(sound, "checkpoint manifest", content)
