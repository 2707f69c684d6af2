"""Work on many tensors at once: nothing lost or reordered, and the first fault ends it as what it is."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamapro.expansion.streams import Advance, in_parallel, sha256_of
from llamapro.files.tensors import TensorFolder


@pytest.fixture(autouse=True)
def _several_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))


def test_results_are_in_the_order_of_the_items_and_all_progress_is_counted() -> None:
    total = 0

    def advance(amount: int) -> None:
        # Read, wait and write: without a lock around it, amounts would be lost.
        nonlocal total
        before = total
        time.sleep(0)
        total = before + amount

    def work(item: int, report: Advance) -> int:
        for _ in range(50):
            report(item)
        return item * item

    assert in_parallel(work, range(40), advance) == [item * item for item in range(40)]
    assert total == 50 * sum(range(40))


def test_items_are_worked_on_at_the_same_time() -> None:
    meeting = threading.Barrier(4, timeout=30)
    assert len(in_parallel(lambda item, report: meeting.wait(), range(4), lambda amount: None)) == 4


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_first_error_is_raised_as_it_is_and_stops_the_others(fault: BaseException) -> None:
    started: list[int] = []

    def work(item: int, report: Advance) -> None:
        started.append(item)
        if item == 2:
            raise fault
        while True:
            report(1)

    with pytest.raises(type(fault)) as caught:
        in_parallel(work, range(1000), lambda amount: time.sleep(0.001))
    assert caught.value is fault
    assert len(started) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensors")]


def test_an_interrupt_of_the_waiting_thread_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def work(item: int, report: Advance) -> None:
        try:
            while True:
                report(1)
        finally:
            ended.set()

    def interrupted(futures: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamapro.expansion.streams.as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(work, [0], lambda amount: None)
    assert ended.is_set()


def test_sha256_is_that_of_the_tensors_bytes(tmp_path: Path) -> None:
    tensor = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    amounts: list[int] = []
    found = sha256_of(TensorFolder.open(tmp_path), "a", amounts.append)
    assert found == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert sum(amounts) == tensor.nbytes
    assert len(amounts) > 1
