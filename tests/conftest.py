"""Shared fixtures: the environment every test runs in, and the worker pool of distributed tests."""

import os
import signal
import sys
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from llamapro.engine.environment import prepare_environment
from tests.support.pool import WorkerPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_environment()  # before any test imports torch or deepspeed: both read it on import
# A shell's background job ignores Ctrl-C and so does whatever it starts; commands under test must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test must not fail because the machine is busy, nor for one in a thousand examples; slow sweeps draw new ones.
settings.register_profile("same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("same")

LEFT_OUT = ("gpu", "slow", "cluster")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out marked tests that were not asked for with -m."""
    if config.option.markexpr:
        return
    for item in items:
        for name in LEFT_OUT:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"marked {name}: select with -m {name}"))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers whatever ran before it, and no other test draws them."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for distributed tests: `pool.run(function, *arguments, world_size=2)`."""
    with WorkerPool() as workers:
        yield workers
