"""The soak in small: it finds nothing where nothing is wrong, and it would find what is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import soak
from tests.soak import KINDS, Diverged, Golden, Soak
from tests.support.rank_process import Disturbance

PLAIN_SEED, NAN_SEED = 0, 1


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    yield Soak(tmp_path_factory.mktemp("soak"))


def test_a_run_with_faults_ends_as_the_undisturbed_one(soaked: Soak) -> None:
    soaked.run(PLAIN_SEED, ["kill one", "flipped bit"])
    assert soaked.met["kill one"] == soaked.met["flipped bit"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_step_that_is_skipped_survives_every_kind_of_fault(soaked: Soak, kind: str) -> None:
    soaked.run(NAN_SEED, [kind, kind])


def test_another_end_is_noticed_and_its_seed_is_said(soaked: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = soaked._undisturbed(Disturbance())
    for wrong in (Golden("other", golden.losses, 1.0), Golden(golden.digest, golden.losses[1:], 1.0)):
        monkeypatch.setitem(soaked._golden, Disturbance(), wrong)
        with pytest.raises(Diverged, match=f"seed {PLAIN_SEED}: after .* are others"):
            soaked._compare(PLAIN_SEED, "undisturbed-0", ["kill one"], wrong)


def test_a_failure_ends_the_soak_with_1_and_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Soak, seed: int) -> None:
        raise Diverged(f"seed {seed}: another end")

    monkeypatch.setattr(Soak, "__init__", lambda self, folder: None)
    monkeypatch.setattr(Soak, "run", fail)
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path))
    assert soak.main(["--seed", "17"]) == 1
    said = capsys.readouterr().err
    assert "seed 17: another end" in said and str(tmp_path) in said
