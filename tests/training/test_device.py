"""The planner is told what a rank really computes on."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from llamapro.planning.plan import CPU_MICRO_TOKENS
from llamapro.training.device import present_device

GPU = SimpleNamespace(name="NVIDIA H200", total_memory=150_754_820_096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as torch describes it."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: GPU)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_its_own_memory_and_peak() -> None:
    device = present_device(8)
    assert (device.name, device.memory_bytes, device.peak_flops) == ("NVIDIA H200", 150_754_820_096, 989e12)
    assert device.most_micro_tokens is None


@pytest.mark.usefixtures("gpu")
def test_the_environment_can_choose_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert present_device(2).name == "cpu"


def test_ranks_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    device = present_device(16)
    assert device.memory_bytes == psutil.virtual_memory().total // 4
    assert device.peak_flops is None and device.most_micro_tokens == CPU_MICRO_TOKENS
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert present_device(16).memory_bytes == psutil.virtual_memory().total // 16
