"""What may change on resume: each row of the table, allowed and refused."""

from typing import Any

import pytest

from llamapro.errors import ConfigError
from llamapro.training.resume import RunIdentity, decide_resume

SCHEDULE = {"learning_rate": 2e-4, "warmup_fraction": 0.06, "decay": "cosine", "final_fraction": 0.1}


def identity(**changes: Any) -> RunIdentity:
    fields: dict[str, Any] = {
        "model": "aa",
        "trainable": "4,9",
        "seed": 1,
        "sequence_length": 128,
        "packing": "bestfit",
        "sources": {"law": "f1", "wiki": "f2"},
        "share_kind": "weight",
        "shares": {"law": 0.8, "wiki": 0.2},
        "planned_stages": (),
        "global_sequences": 16,
        "steps": 100,
        "schedule": SCHEDULE,
        "optimizer": {"betas": [0.9, 0.95]},
    }
    return RunIdentity.model_validate({**fields, **changes})


def test_nothing_changed_means_nothing_to_say() -> None:
    decision = decide_resume(identity(), identity(), 10, [])
    assert decision.events == () and not decision.new_stage


@pytest.mark.parametrize(
    "changes",
    [
        {"shares": {"law": 0.5, "wiki": 0.5}},
        {"sources": {"law": "f1", "wiki": "f2", "code": "f3"}, "shares": {"law": 0.6, "wiki": 0.2, "code": 0.2}},
        {"global_sequences": 32},
    ],
)
def test_weights_new_sources_and_global_batch_start_a_new_stage(changes: dict[str, Any]) -> None:
    decision = decide_resume(identity(), identity(**changes), 10, [])
    assert decision.new_stage and decision.events


def test_another_objective_is_free_and_told() -> None:
    plain, replay = {"replay_kl": 0.0, "sets": []}, {"replay_kl": 1.0, "sets": ["wiki"]}
    decision = decide_resume(identity(objective=plain), identity(objective=replay), 10, [])
    (event,) = decision.events
    assert "objective" in event and "replay_kl 0.0 -> 1.0" in event and not decision.new_stage
    assert decide_resume(identity(), identity(objective=replay), 10, []).events == ()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": "bb"}, "model.path"),
        ({"trainable": "4"}, "model.trainable"),
        ({"seed": 2}, "run.seed"),
        ({"sequence_length": 64}, "data.sequence_length"),
        ({"packing": "concat"}, "data.packing"),
        ({"sources": {"law": "changed", "wiki": "f2"}}, "data.sources.law"),
        ({"sources": {"law": "f1"}, "shares": {"law": 1.0}}, "data.sources.wiki"),
        ({"schedule": {**SCHEDULE, "learning_rate": 1e-4}}, "schedule"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, "optimizer"),
        ({"steps": 200}, "schedule.steps"),
    ],
)
def test_what_would_make_it_another_run_is_refused_with_the_way_out(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decide_resume(identity(), identity(**changes), 10, [])
    assert any(problem.startswith(key) and "start_from" in problem for problem in caught.value.problems)


def test_every_refusal_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        decide_resume(identity(), identity(seed=2, model="bb", steps=200), 10, [])
    assert len(caught.value.problems) == 3


def test_accepted_sections_may_change_and_are_logged() -> None:
    now = identity(schedule={**SCHEDULE, "learning_rate": 1e-4}, optimizer={"betas": [0.8, 0.9]})
    decision = decide_resume(identity(), now, 10, ["schedule", "optimizer"])
    assert len(decision.events) == 2 and not decision.new_stage


def test_more_steps_are_free_under_constant_and_before_wsd_decays() -> None:
    constant = {**SCHEDULE, "decay": "constant"}
    decide_resume(identity(schedule=constant), identity(schedule=constant, steps=200), 99, [])
    wsd = {**SCHEDULE, "decay": "wsd", "decay_fraction": 0.2}
    decide_resume(identity(schedule=wsd), identity(schedule=wsd, steps=200), 80, [])
    with pytest.raises(ConfigError):
        decide_resume(identity(schedule=wsd), identity(schedule=wsd, steps=200), 81, [])


def test_repeats_can_not_change() -> None:
    stored = identity(share_kind="repeat", shares={"law": 1.5, "wiki": 1.0})
    with pytest.raises(ConfigError):
        decide_resume(stored, identity(share_kind="repeat", shares={"law": 2.0, "wiki": 1.0}), 10, [])
