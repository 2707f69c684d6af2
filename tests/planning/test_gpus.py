"""A device gets its own figures or none."""

import pytest

from llamapro.errors import UserError
from llamapro.planning.gpus import GPUS, find_gpu, gpu_named, peak_flops

DRIVER_NAMES = [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100 pcie"),
    ("NVIDIA H100 NVL", "h100 nvl"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA GH200 480GB", "gh200"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA A100-SXM4-40GB", "a100 40gb"),
    ("NVIDIA A100-PCIE-40GB", "a100 40gb"),
    ("NVIDIA A10G", "a10g"),
    ("NVIDIA A10", "a10"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA L4", "l4"),
    ("NVIDIA RTX A6000", "rtx a6000"),
    ("NVIDIA GeForce RTX 4090", "rtx 4090"),
    ("AMD Instinct MI300X", "mi300x"),
]


@pytest.mark.parametrize(("device", "row"), DRIVER_NAMES)
def test_a_device_is_found_by_the_name_its_driver_reports(device: str, row: str) -> None:
    gpu = find_gpu(device)
    assert gpu is not None and gpu.name == row


@pytest.mark.parametrize("device", ["cpu", "", "NVIDIA GeForce GTX 1080", "NVIDIA H1000", "NVIDIA L400", "Intel Arc"])
def test_an_unknown_device_has_no_figures_instead_of_anothers(device: str) -> None:
    assert find_gpu(device) is None
    assert peak_flops(device) is None


def test_an_h200_is_no_a100() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12


def test_every_row_is_found_by_its_own_name() -> None:
    assert [gpu_named(gpu.name) for gpu in GPUS] == list(GPUS)


def test_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="h300.*did you mean .?h[128]00"):
        gpu_named("h300")
