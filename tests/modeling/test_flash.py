"""Which FlashAttention is put behind torch's attention, told by packages that are and aren't installed."""

import sys
from types import ModuleType

import pytest
import torch.nn.attention

from llamapro.modeling.flash import Flash, FlashPackage, activate, newest_flash

NEW = FlashPackage("NEW", "llamapro_newest_kernels", (9, 10), 128)
OLD = FlashPackage("OLD", "llamapro_older_kernels", (9,), 256)


@pytest.fixture
def both_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (NEW, OLD):
        monkeypatch.setitem(sys.modules, package.module, ModuleType(package.module))


def test_without_packages_it_is_torch_s_own_and_says_why() -> None:
    flash = newest_flash(9, 128, (NEW, OLD))
    assert flash.name == "FA2"
    assert "NEW not installed" in flash.reason and "llamapro_older_kernels" in flash.reason


@pytest.mark.usefixtures("both_installed")
def test_the_newest_that_fits_is_taken() -> None:
    assert newest_flash(9, 128, (NEW, OLD)) == Flash("NEW", "llamapro_newest_kernels is installed")
    wide = newest_flash(9, 256, (NEW, OLD))
    assert wide.name == "OLD" and "NEW has heads of at most 128" in wide.reason
    assert newest_flash(10, 64, (NEW, OLD)).name == "NEW"
    ampere = newest_flash(8, 64, (NEW, OLD))
    assert ampere.name == "FA2" and "compute capability 8" in ampere.reason


@pytest.mark.usefixtures("both_installed")
def test_a_torch_without_the_registry_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    flash = newest_flash(9, 128, (NEW, OLD))
    assert flash.name == "FA2" and "has no registry" in flash.reason


def test_only_a_package_s_kernels_are_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    activate(Flash("FA2", ""))
    activate(Flash("FA4", ""))
    assert activated == ["FA4"]


def test_the_registry_of_the_installed_torch_knows_the_names() -> None:
    assert {"FA3", "FA4"} <= set(torch.nn.attention.list_flash_attention_impls())
