"""What the doctor says of a job's hosts: two ranks stand for two hosts, and the one that differs is named."""

import time
from pathlib import Path

import pytest

from llamapro.doctor import job, packages
from llamapro.doctor.bandwidth import Rates, measure_rates
from llamapro.doctor.finding import FAILED, NOTE, OK, Finding
from llamapro.doctor.job import best_link, check_job, check_names, judge_alike, judge_clocks, judge_folder, judge_rates
from llamapro.ranks import Ranks
from tests.support.pool import WorkerPool

HOSTS = ["a", "b"]


def examine(ranks: Ranks, folders: list[str], clock: float = 0.0, torch_version: str = "") -> list[list[str]]:
    """As if each rank ran on a host of its own; the last one's clock and version may differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "FOLDER_WAIT_SECONDS", 0.5)
        if ranks.rank == ranks.world_size - 1:
            now = time.time
            patch.setattr(job.time, "time", lambda: now() + clock)
            known = packages.versions
            if torch_version:
                patch.setattr(job, "versions", lambda: {**known(), "torch": torch_version})
        found = check_job(ranks, Path(folders[ranks.rank]), HOSTS[ranks.rank])
    return [[finding.what, finding.state, finding.found] for finding in found]


def failed(found: list[list[str]]) -> dict[str, str]:
    return {what: text for what, state, text in found if state == FAILED}


def test_hosts_that_fit_together_pass_and_leave_nothing_behind(pool: WorkerPool, tmp_path: Path) -> None:
    first, second = pool.run(examine, [str(tmp_path)] * 2)
    assert first == second and failed(first) == {}
    found = {what: text for what, _, text in first}
    assert found["ranks per host"] == "a 1, b 1"
    assert "GB/s" in found["all-reduce, all ranks"] and found["between hosts"].startswith("a → b ")
    assert found[f"folder {tmp_path}"] == "every host sees what the others write"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared_is_noticed(pool: WorkerPool, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    found = failed(pool.run(examine, [str(place) for place in places])[0])
    (text,) = found.values()
    assert "a does not see what b wrote; b does not see what a wrote" in text
    assert all(list(place.iterdir()) == [] for place in places)


def test_a_folder_that_one_host_lacks_names_it(pool: WorkerPool, tmp_path: Path) -> None:
    found = failed(pool.run(examine, [str(tmp_path), str(tmp_path / "missing")])[0])
    assert any("b can't write there: No such file" in text for text in found.values())


def test_another_version_and_a_wrong_clock_name_the_host(pool: WorkerPool, tmp_path: Path) -> None:
    found = failed(pool.run(examine, [str(tmp_path)] * 2, -100.0, "1.0")[0])
    assert found["torch"].startswith("1.0 on b, and ")
    assert found["clocks"].startswith("b is 100.0 s behind")


def test_one_host_that_differs_among_many_is_named() -> None:
    same = {f"n{index}": "2.11" for index in range(8)}
    assert judge_alike("torch", same) == Finding("torch", OK, "2.11 on every host")
    finding = judge_alike("torch", {**same, "n5": "2.10"})
    assert (finding.state, finding.found) == (FAILED, "2.10 on n5, and 2.11 on the others")


def test_two_hosts_of_one_name_are_noticed() -> None:
    assert check_names(["a", "a", "b"], [0, 1, 0]) == []
    (finding,) = check_names(["vm", "vm"], [0, 0])
    assert finding.state == FAILED and "vm" in finding.found


@pytest.mark.parametrize(("ahead", "state"), [(0.01, OK), (5.0, NOTE), (-90.0, FAILED)])
def test_the_host_whose_clock_is_wrong_is_named(ahead: float, state: str) -> None:
    finding = judge_clocks({"a": 0.0, "b": ahead, "c": 0.001})
    assert finding.state == state
    assert state == OK or ("b is" in finding.found and ("ahead" in finding.found) == (ahead > 0))


def test_the_host_that_does_not_see_the_folder_is_named() -> None:
    unseen = {"a": ["c"], "b": ["c"], "c": ["a", "b"]}
    finding = judge_folder(Path("/runs"), {}, unseen)
    assert finding.state == FAILED and finding.found.startswith("c does not see what a and b wrote; put")


def test_the_slow_host_is_named_and_not_its_neighbours() -> None:
    links = {("a", "b"): 10e9, ("b", "c"): 1e9, ("c", "d"): 1e9, ("d", "a"): 10e9}
    assert best_link(links) == {"a": 10e9, "b": 10e9, "c": 1e9, "d": 10e9}
    within = {"a": 200e9, "b": 190e9, "c": 210e9, "d": 50e9}
    found = {finding.what: finding for finding in judge_rates(Rates(1e9, within, links))}
    assert found["between hosts"].state == found["all-reduce within a host"].state == FAILED
    assert found["between hosts"].found.endswith("less than half of the others: c")
    assert found["all-reduce within a host"].found.endswith("less than half of the others: d")


def rates(ranks: Ranks, hosts: list[str]) -> tuple[float, dict[str, float], dict[tuple[str, str], float]]:
    measured = measure_rates(ranks, hosts)
    return measured.everywhere, measured.within, measured.links


def test_every_group_and_link_is_measured(pool: WorkerPool) -> None:
    results = pool.run(rates, ["a", "a", "b"], world_size=3)
    assert results[0] == results[1] == results[2]
    everywhere, within, links = results[0]
    assert everywhere > 0 and set(within) == {"a"} and set(links) == {("a", "b")}
    assert all(rate > 0 for rate in (*within.values(), *links.values()))


def test_one_rank_has_nothing_to_measure() -> None:
    assert measure_rates(Ranks.solo(), ["a"]) == Rates(0.0)
