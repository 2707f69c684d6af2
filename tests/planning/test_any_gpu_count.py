"""The global batch is the run's, whatever number of GPUs it is on: accumulation makes up for it."""

from itertools import product

import pytest

from llamapro.config.root import RunConfig
from llamapro.planning.memory import GIB
from llamapro.planning.plan import choose
from llamapro.planning.run_job import job_of_run
from llamapro.planning.shape import Learning
from tests.planning.test_plan import SHAPE
from tests.support.config import minimal_values

NEW = Learning(frozenset(range(4, 40, 5)))


@pytest.mark.parametrize("global_sequences", [1, 60, 1024])
def test_every_number_of_gpus_takes_the_same_sequences_per_step(global_sequences: int) -> None:
    config = RunConfig.model_validate(minimal_values() | {"batch": {"global_sequences": global_sequences}})
    for gpus, budget in product(range(1, 65), (40 * GIB, 80 * GIB)):
        choice = choose(job_of_run(config, SHAPE, NEW, gpus), budget_bytes=budget)
        computed = gpus * choice.micro_sequences * choice.accumulation_steps
        assert computed >= global_sequences
        # What is computed beyond them is padding: less than a sequence more for each rank.
        assert computed - global_sequences < gpus
        assert (computed == global_sequences) == (global_sequences % gpus == 0)
