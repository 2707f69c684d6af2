"""What the doctor says of one machine: each complaint is shown by a machine that deserves it."""

import resource
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from llamapro.doctor import machine
from llamapro.doctor.finding import FAILED, NOTE, OK
from llamapro.doctor.machine import (
    GIB,
    MIB,
    check_attention,
    check_compiler,
    check_disk,
    check_machine,
    check_network,
    judge_locked_memory,
    judge_open_files,
    judge_shared_memory,
    judge_unused_gpus,
    rdma_ports,
)
from llamapro.doctor.packages import check_package, check_packages, versions

CPU = torch.device("cpu")


def test_this_machine_can_train(tmp_path: Path) -> None:
    found = [*check_packages(), *check_machine(tmp_path)]
    assert [finding for finding in found if finding.state == FAILED] == []
    assert {"python", "torch", "deepspeed", "GPUs", "attention", "compile", "shared memory", "open files"} <= {
        finding.what for finding in found
    }


@pytest.mark.parametrize(
    ("needed", "state", "text"),
    [
        ("torch>=2", OK, torch.__version__),
        ("torch>=99", FAILED, ">=99 is needed"),
        ("no-such-package>=3", FAILED, "pip install 'no-such-package>=3'"),
    ],
)
def test_packages_are_compared_with_what_is_needed(needed: str, state: str, text: str) -> None:
    finding = check_package(Requirement(needed))
    assert finding.state == state and text in finding.found


def test_versions_name_what_hosts_must_have_alike() -> None:
    found = versions()
    assert found["torch"] == torch.__version__ and {"python", "deepspeed", "llamapro"} <= set(found)


@pytest.mark.parametrize(
    ("devices", "built_for", "visible", "state", "text"),
    [
        (0, None, None, NOTE, "none; training runs on the CPU"),
        (8, None, None, FAILED, "8 NVIDIA devices, but torch"),
        (1, "12.8", None, FAILED, "new enough for CUDA 12.8"),
        (1, "12.8", "", NOTE, "hidden by CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_why_no_gpu_is_used(devices: int, built_for: str | None, visible: str | None, state: str, text: str) -> None:
    finding = judge_unused_gpus(devices, built_for, visible)
    assert finding.state == state and text in finding.found


def test_attention_kernels_are_listed_and_why_others_do_not_run() -> None:
    found = {finding.what: finding.found for finding in check_attention(CPU)}
    assert {"sdpa", "math"} <= set(found["attention"].split(", "))
    assert "CUDA" in found["attention cudnn"]


def test_a_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = check_compiler(CPU)
    assert finding.state == NOTE and "no-such-compiler" in finding.found


@pytest.mark.parametrize(
    ("total", "gpus", "state"),
    [(64 * MIB, 0, OK), (64 * MIB, 1, OK), (64 * MIB, 8, FAILED), (512 * MIB, 8, NOTE), (8 * GIB, 8, OK)],
)
def test_shared_memory_must_do_for_the_gpus(total: int, gpus: int, state: str) -> None:
    assert judge_shared_memory(total, gpus).state == state


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    assert check_disk(tmp_path).state in (OK, NOTE)
    assert list(tmp_path.iterdir()) == []
    finding = check_disk(tmp_path / "missing")
    assert finding.state == FAILED and "No such file" in finding.found


def test_little_disk_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_FREE_DISK", 1 << 60)
    assert check_disk(tmp_path).state == NOTE


def test_active_adapters_are_found(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert rdma_ports(tmp_path) == ["mlx5_0/1: 400 Gb/sec (4X NDR)"]
    assert "TCP" in check_network(rdma_ports(tmp_path / "missing")).found


def test_limits_that_stop_training_fail() -> None:
    assert judge_open_files(256).state == FAILED
    assert judge_open_files(resource.RLIM_INFINITY).state == judge_open_files(65536).state == OK
    assert judge_locked_memory(8 * MIB, rdma=True).state == FAILED
    assert judge_locked_memory(8 * MIB, rdma=False).state == OK
    assert judge_locked_memory(resource.RLIM_INFINITY, rdma=True).state == OK
