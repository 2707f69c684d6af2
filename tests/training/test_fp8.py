"""Whole runs with frozen weights in FP8: stages, resume, export and proof."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamapro.errors import ConfigError
from llamapro.expansion.record import read_record
from llamapro.export.export import export
from llamapro.modeling.fp8 import FP8Linear, quantize_rows
from llamapro.ranks import Ranks
from llamapro.training import fp8
from llamapro.training.device import cpu_device
from llamapro.training.preflight import check_facts
from llamapro.training.progress import Progress
from llamapro.training.proof import prove_frozen_weights
from tests.support.config import config_of
from tests.support.pool import WorkerError, WorkerPool
from tests.support.training import losses, open_run, prepare, run_training, settings, state_digest, trained_weights

FROZEN_LINEARS = 4 * 4  # q, k, v and o of four old blocks; the MLP's width of 88 is no multiple of 16
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("fp8"), dtype=torch.bfloat16)


def values_of(folder: Path, run: str, stage: int = 1, precision: str = "fp8-frozen") -> dict[str, Any]:
    return settings(folder, run, engine={"precision": precision, "zero_stage": stage})


@pytest.fixture(scope="module")
def reference(folder: Path, pool: WorkerPool) -> list[dict[str, Any]]:
    """Eight steps on two ranks at stage 1."""
    metrics: list[dict[str, Any]] = pool.run(run_training, values_of(folder, "fp8"), world_size=2)[0]
    return metrics


@pytest.mark.parametrize(("stage", "world_size"), [(2, 2), (1, 1)])
def test_losses_do_not_depend_on_stage_or_world_size(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]], stage: int, world_size: int
) -> None:
    """As close as bf16 runs are: gradients are summed in another order, and Adam's first updates are all sign."""
    found = pool.run(run_training, values_of(folder, f"fp8-{stage}-{world_size}", stage), world_size=world_size)[0]
    assert len(losses(found)) == STEPS
    assert losses(found) == pytest.approx(losses(reference), rel=5e-3)


def test_weights_go_where_they_go_in_bf16(folder: Path, pool: WorkerPool, reference: list[dict[str, Any]]) -> None:
    bf16 = losses(pool.run(run_training, values_of(folder, "bf16", precision="bf16"), world_size=2)[0])
    assert losses(reference) != bf16
    assert losses(reference) == pytest.approx(bf16, rel=0.01)
    before = load_file(folder / "expanded" / "model.safetensors")
    trained = {run: trained_weights(folder / run) for run in ("fp8", "bf16")}
    for name in trained["bf16"]:
        moves = [trained[run][name] - before[name].float().flatten() for run in ("fp8", "bf16")]
        assert torch.cosine_similarity(*moves, dim=0) > 0.6, name


def test_stopped_and_resumed_equals_not_stopped(
    folder: Path, pool: WorkerPool, reference: list[dict[str, Any]]
) -> None:
    values = values_of(folder, "stopped")
    with pytest.raises(WorkerError, match="RetryLater: the test asks"):
        pool.run(run_training, values, 5, world_size=2)
    resumed = pool.run(run_training, values, world_size=2)[0]
    assert losses(resumed) == losses(reference)
    assert state_digest(folder / "stopped") == state_digest(folder / "fp8")


def test_every_frozen_weight_is_proved_in_the_form_it_has(folder: Path, reference: list[dict[str, Any]]) -> None:
    record = read_record(folder / "expanded")
    assert record is not None
    in_bf16 = len(record.base_tensors) - FROZEN_LINEARS
    claim = f"{in_bf16} of {in_bf16} base tensors in bf16 equal the record; "
    claim += f"{2 * FROZEN_LINEARS} of {2 * FROZEN_LINEARS} FP8 codes and scales of frozen weights equal"
    proofs = [line for line in reference if line.get("event") == "proof"]
    assert len(proofs) == 3  # at the start and at two checkpoints
    for proof in proofs:
        assert proof["equal"] == proof["total"] == in_bf16 + 2 * FROZEN_LINEARS
        assert proof["text"].startswith(claim)


def test_the_log_says_what_is_in_fp8_and_how(pool: WorkerPool, reference: list[dict[str, Any]]) -> None:
    weights = 4 * (2 * 32 * 32 + 2 * 32 * 16)
    assert re.search(
        rf"precision: {FROZEN_LINEARS} frozen matrices in FP8 \(E4M3\), {weights:,} weights; emulated on the CPU in "
        r"float32, slower than bf16; matrices left in bf16: 12 that are routers or have sizes not divisible by 16",
        " ".join(pool.output().split()),
    )


def test_the_export_has_the_base_bit_for_bit(folder: Path, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    record = read_record(folder / "expanded")
    assert record is not None
    export(folder / "fp8", tmp_path / "out", model=folder / "expanded")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(folder / "expanded" / "model.safetensors")
    assert exported.keys() == before.keys()
    changed = {name for name in exported if not torch.equal(exported[name], before[name])}
    assert {int(name.split(".")[2]) for name in changed} == set(record.new_blocks)
    assert not changed & record.base_tensors.keys()


def test_the_folders_bytes_are_checked_before_they_are_cast(folder: Path, pool: WorkerPool, tmp_path: Path) -> None:
    """The lowest bit of the smallest weight of a row: its code is the same, its digest is not."""
    copy, name = tmp_path / "expanded", "model.layers.1.self_attn.v_proj.weight"
    shutil.copytree(folder / "expanded", copy)
    tensors = load_file(copy / "model.safetensors")
    row = tensors[name][0].clone()
    place = int(row.abs().argmin())
    tensors[name][0].view(torch.int16)[place] ^= 1
    assert torch.equal(quantize_rows(row[None])[0].float(), quantize_rows(tensors[name][:1])[0].float())
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    values = settings(folder, str(tmp_path / "run"), engine={"precision": "fp8-frozen"}, model={"path": str(copy)})
    with pytest.raises(WorkerError, match=rf"CheckFailed: .*{name} differ from the expansion record"):
        pool.run(open_run, values, world_size=1)


@pytest.mark.parametrize("buffer", ["codes", "scales"])
def test_one_changed_bit_on_one_rank_stops_the_run(folder: Path, pool: WorkerPool, buffer: str) -> None:
    with pytest.raises(WorkerError, match=rf"CheckFailed: frozen weights changed.* 31 of 32 FP8.*v_proj\.{buffer}"):
        pool.run(_flip_a_bit, values_of(folder, f"flipped-{buffer}"), buffer, world_size=2)


def _flip_a_bit(ranks: Ranks, values: dict[str, Any], buffer: str) -> None:
    session, _ = open_run(ranks, values)
    prove_frozen_weights(session, Progress())
    linear = session.engine.model.blocks[1].self_attn.v_proj
    assert isinstance(linear, FP8Linear)
    if ranks.rank == 1:
        getattr(linear, buffer).view(torch.uint8)[3, 0] ^= 1
    prove_frozen_weights(session, Progress())


def test_ranks_that_read_other_bytes_do_not_start(folder: Path, pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"CheckFailed: FP8 weights are not the same on all ranks: .*k_proj\.codes"):
        pool.run(_start_with_other_codes, world_size=2)


def _start_with_other_codes(ranks: Ranks) -> None:
    linear = torch.nn.Module()
    linear.k_proj = FP8Linear()
    linear.k_proj.register_buffer("codes", torch.full((16, 16), float(ranks.rank)).to(torch.float8_e4m3fn))
    fp8.folds_at_start(linear, ranks)


def problems_of(folder: Path, tmp_path: Path, **sections: Any) -> tuple[str, ...]:
    values = settings(folder, "refused", **sections)
    with pytest.raises(ConfigError) as caught:
        check_facts(config_of(tmp_path, **values), "pretrain", 1, cpu_device(1))
    return caught.value.problems


def test_older_gpus_are_refused_beside_every_other_problem(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "compute_capability", lambda: (8, 0))
    engine = {"precision": "fp8-frozen"}
    found = problems_of(folder, tmp_path, engine=engine, checkpoint={"start_from": str(tmp_path / "nowhere")})
    assert [problem.partition(":")[0] for problem in found] == ["checkpoint.start_from", "engine.precision"]
    assert "compute capability 9.0 (Hopper) or newer, this has 8.0; use bf16" in found[1]


def test_a_run_in_which_everything_learns_is_refused(folder: Path, tmp_path: Path) -> None:
    (problem,) = problems_of(
        folder,
        tmp_path,
        engine={"precision": "fp8-frozen"},
        model={"path": str(folder / "expanded"), "trainable": "all"},
    )
    assert problem.startswith("engine.precision: fp8-frozen is for frozen weights")


def test_a_model_without_fitting_layers_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamapro.planning.fp8_weights.MULTIPLE", 64)
    (problem,) = problems_of(folder, tmp_path, engine={"precision": "fp8-frozen"})
    assert "no frozen block of" in problem and "sizes divisible by" in problem


def test_on_the_cpu_it_is_said_to_be_emulated(folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, **settings(folder, "said", engine={"precision": "fp8-frozen"}))
    warnings = check_facts(config, "pretrain", 1, cpu_device(1)).warnings
    assert [
        warning for warning in warnings if warning.startswith("engine.precision: fp8-frozen is emulated on the CPU")
    ]


def test_auto_never_chooses_a_stage_that_would_cut_what_is_in_fp8(folder: Path, tmp_path: Path) -> None:
    from llamapro.training.device import Device

    engine = {"precision": "fp8-frozen", "zero_stage": "auto"}
    config = config_of(tmp_path, **settings(folder, "auto", engine=engine))
    assert check_facts(config, "pretrain", 8, Device("tiny", 1000, None, None)).zero_stage == 2
