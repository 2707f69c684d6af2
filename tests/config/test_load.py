"""A configuration is read whole, or every problem of it is told at once."""

from pathlib import Path

import pytest

from llamapro.config.load import dump_config, load_config
from llamapro.config.root import RunConfig
from llamapro.errors import ConfigError, UserError
from tests.support.config import config_of, minimal_values, write_config

# The others are experiments, which have a schema and tests of their own.
RECIPES = [
    path
    for path in sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
    if "\nrun: " in path.read_text()
]
VALID = """\
model: {path: work/model}
data:
  sources:
    law: {path: data/law, weight: 0.8}
    wi-ki: {path: data/wiki, weight: 0.2}
schedule: {learning_rate: 2e-4, steps: 100}
"""
# Settings that hold settings: not one line of the help.
MAPPINGS = {"data.stages", "data.sources", "model.lora", "guards.retention"}
# One mistake per line.
BROKEN = """\
model:
  path: work/model
  alow_cast: true
data:
  sequence_length: 0
  sources:
    law: {path: data/law, weight: 0.8}
    wiki: {path: data/wiki, repeat: 2}
batch: {global_sequences: many}
schedule: {decay: cosin, warmup_fraction: 1.5}
guards: {retention: {set: wikki}}
optimizer:
  sequence_length: 12
loging: {}
"""


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def only_problem(path: Path, *overrides: str) -> str:
    (problem,) = problems_of(path, *overrides)
    return problem


def test_every_kind_of_mistake_is_told_in_one_message(tmp_path: Path) -> None:
    problems = problems_of(write_config(tmp_path, BROKEN))
    expected = {
        "model.alow_cast": ("did you mean allow_cast?", "line 3"),
        "data.sequence_length": ("0", "an integer, at least 1", "line 5"),
        "data.sources": ("weight (law)", "repeat (wiki)"),
        "batch.global_sequences": ("'many'", "an integer", "line 9"),
        "schedule.decay": ("'cosin'", "did you mean cosine?", "linear, constant, wsd", "line 10"),
        "schedule.warmup_fraction": ("1.5", "below 1", "line 10"),
        "guards.retention.set": ("'wikki'", "did you mean wiki?", "law, wiki", "line 11"),
        "optimizer.sequence_length": ("did you mean data.sequence_length?", "line 13"),
        "loging": ("did you mean logging?", "line 14"),
    }
    told = {problem.partition(":")[0]: problem for problem in problems}
    assert told.keys() == expected.keys()
    for key, parts in expected.items():
        assert all(part in told[key] for part in parts), told[key]


def test_messages_have_no_trace_of_the_library(tmp_path: Path) -> None:
    text = "\n".join(problems_of(write_config(tmp_path, BROKEN)))
    for trace in ("pydantic", "http", "type=", "input_value", "constrained", "Input should"):
        assert trace not in text


def test_problems_of_the_command_line_join_those_of_the_file(tmp_path: Path) -> None:
    problems = problems_of(
        write_config(tmp_path, VALID.replace("steps: 100", "steps: no")), "--engine.zero_stage", "7", "stray.word"
    )
    assert any(p.startswith("schedule.steps: 'no'") and "line 6" in p for p in problems)
    assert any(
        p.startswith("engine.zero_stage: [7, 'stray.word']") and "from --engine.zero_stage" in p for p in problems
    )


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, VALID), ["--optimizer.eps", "1e-6"])
    assert config.schedule.learning_rate == 2e-4
    assert config.optimizer.eps == 1e-6


def test_words_that_older_yaml_turns_into_something_else_stay_text(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, VALID + "engine: {compile: off}\nrun: {folder: no}\n"))
    assert config.engine.compile == "off"
    assert config.run.folder == Path("no")


@pytest.mark.parametrize(
    ("words", "section", "field", "value"),
    [
        (["--schedule.steps", "7"], "schedule", "steps", 7),
        (["--schedule.steps=7"], "schedule", "steps", 7),
        (["--model.trainable", "4", "9"], "model", "trainable", (4, 9)),
        (["--model.trainable", "4"], "model", "trainable", (4,)),
        (["--model.trainable", "[4, 9]"], "model", "trainable", (4, 9)),
        (["--model.trainable", "last-added"], "model", "trainable", "last-added"),
        (["--model.trainable", "expansion-12"], "model", "trainable", "expansion-12"),
        (["--logging.trackers", "[]"], "logging", "trackers", ()),
        (["--optimizer.betas", "0.8", "0.9"], "optimizer", "betas", (0.8, 0.9)),
        (["--optimizer.gradient_clip_norm", "null"], "optimizer", "gradient_clip_norm", None),
        (["--optimizer.gradient_clip_norm", "None"], "optimizer", "gradient_clip_norm", None),
        (["--model.allow_cast", "True"], "model", "allow_cast", True),
    ],
)
def test_an_override_replaces_the_value_of_the_file(
    tmp_path: Path, words: list[str], section: str, field: str, value: object
) -> None:
    path = write_config(tmp_path, VALID)
    plain, changed = load_config(path), load_config(path, words)
    assert getattr(getattr(changed, section), field) == value
    assert getattr(getattr(plain, section), field) != value
    rest = {name: getattr(changed, name) for name in RunConfig.model_fields if name != section}
    assert rest == {name: getattr(plain, name) for name in rest}


def test_an_override_reaches_a_source_and_a_section_that_is_null(tmp_path: Path) -> None:
    words = ["--data.sources.wi-ki.weight", "0.5", "--guards.retention.set", "law"]
    config = load_config(write_config(tmp_path, VALID), words)
    assert config.data.sources["wi-ki"].weight == 0.5
    assert config.guards.retention is not None and config.guards.retention.set == "law"


def test_a_source_can_be_written_as_the_help_shows_it(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, VALID), ["--data.sources.wi_ki.weight", "0.5"])
    assert config.data.sources["wi-ki"].weight == 0.5


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--schedule.stepz", "7"], "did you mean steps?"),
        (["schedule.steps", "7"], "--section.field value"),
        (["--schedule.steps"], "has no value"),
        (["--schedule.steps.more", "7"], "no settings of its own"),
        (["--schedule.steps", "7", "--schedule.steps", "8"], "more than once"),
    ],
)
def test_a_word_that_can_not_be_used_is_refused(tmp_path: Path, words: list[str], part: str) -> None:
    assert any(part in problem for problem in problems_of(write_config(tmp_path, VALID), *words))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {path: a}\nmodel: {path: b}\n", ("line 2", "duplicate key", "keep one")),
        (VALID + "schedule: {steps: 1}\n", ("line 7", "duplicate key")),
        ("model: [1\nb: 2\n", ("line 2", "not YAML")),
        ("- 1\n", ("must be a mapping", "a list")),
        ("", ("must be a mapping", "empty")),
        ("model: !!python/object:os.system {}\n", ("line 1", "not YAML")),
    ],
)
def test_a_file_that_is_no_mapping_is_one_clear_message(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write_config(tmp_path, text))
    message = str(caught.value)
    assert "run.yaml" in message and all(part in message for part in parts), message


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        load_config(tmp_path / "absent.yaml")
    assert str(Path.cwd()) in str(caught.value)


def test_required_keys_are_named(tmp_path: Path) -> None:
    problems = problems_of(write_config(tmp_path, "run: {seed: 1}\n"))
    assert [problem.partition(":")[0] for problem in problems] == ["model", "data"]
    assert only_problem(write_config(tmp_path, VALID.replace("path: work/model", "allow_cast: false"))).startswith(
        "model.path: is required"
    )


def test_a_rule_is_told_although_a_required_key_is_missing(tmp_path: Path) -> None:
    text = VALID.replace("{path: work/model}", "{}").replace("weight: 0.2", "repeat: 2")
    keys = {problem.partition(":")[0] for problem in problems_of(write_config(tmp_path, text))}
    assert keys == {"model.path", "data.sources"}


def test_what_follows_from_a_wrong_value_is_not_told_again(tmp_path: Path) -> None:
    text = VALID.replace("weight: 0.8", "weight: heavy")
    assert only_problem(write_config(tmp_path, text)).startswith("data.sources.law.weight: 'heavy'")


@pytest.mark.parametrize("value", ["expansion-0", "expansion-", "expansion-1.5", "expansion 1", "expansions-1"])
def test_an_expansion_is_named_by_its_number(tmp_path: Path, value: str) -> None:
    problem = only_problem(write_config(tmp_path, VALID.replace("path: work/model", f"path: a, trainable: {value}")))
    assert problem.startswith(f"model.trainable: {value!r} is not valid") and "or expansion-N, or a list" in problem


@pytest.mark.parametrize("value", ["'100'", "true", "10.5", "[100]", "null"])
def test_types_are_strict(tmp_path: Path, value: str) -> None:
    problem = only_problem(write_config(tmp_path, VALID.replace("steps: 100", f"steps: {value}")))
    assert problem.startswith("schedule.steps:") and "an integer" in problem


def test_names_of_sources_are_plain(tmp_path: Path) -> None:
    problem = only_problem(write_config(tmp_path, VALID.replace("law:", "'l aw':")))
    assert "'l aw'" in problem and "letters, digits" in problem


def test_the_dump_gives_the_same_configuration_back(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        model={"trainable": [4, 9]},
        validation={"sets": {"general": "data/general"}},
        guards={"retention": {"set": "general"}},
        schedule={"learning_rate": 3e-5},
    )
    assert load_config(write_config(tmp_path, dump_config(config))) == config


def test_the_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert config == RunConfig.model_validate(minimal_values())
    dumped = config.model_dump(mode="json")
    assert dumped["batch"] == {"global_sequences": 1024, "micro_sequences": "auto"}
    assert dumped["optimizer"] == {
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "gradient_clip_norm": 1.0,
    }
    assert dumped["engine"]["zero_stage"] == dumped["engine"]["compile"] == "auto"
    assert dumped["checkpoint"]["every_steps"] == 500 and dumped["checkpoint"]["accept"] == []
    assert dumped["guards"]["spike"] == "skip" and dumped["guards"]["retention"] is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe: Path) -> None:
    load_config(recipe)


def test_the_recipe_of_the_paper_says_what_the_paper_says() -> None:
    config = load_config(next(path for path in RECIPES if path.name == "llama-pro-8b.yaml"))
    assert config.data.sequence_length * config.batch.global_sequences == 4_194_304
    assert (config.schedule.steps, config.schedule.learning_rate, config.schedule.warmup_fraction) == (
        15900,
        2e-4,
        0.06,
    )
    assert {source.repeat for source in config.data.sources.values()} == {1.5, 1.0}


def test_help_shows_the_values_of_the_file_and_of_the_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, VALID + "run: {seed: 987654}\n")
    with pytest.raises(SystemExit) as caught:
        load_config(path, ["--schedule.steps", "43210", "--help"])
    page = capsys.readouterr().out
    assert caught.value.code == 0
    assert "987654" in page and "43210" in page and "data/law" in page
    for section, field in RunConfig.model_fields.items():
        assert field.annotation is not None
        for name in field.annotation.model_fields:
            if (section, name) not in {
                ("data", "stages"),
                ("data", "sources"),
                ("model", "lora"),
                ("guards", "retention"),
            }:
                assert f"--{section}.{name}" in page


def test_only_rank_0_prints_the_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load_config(write_config(tmp_path, VALID), ["--help"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", ["1", "1.5", "null", "true", "? [a]\n"])
@pytest.mark.parametrize("section", ["", "run"])
def test_a_key_that_is_no_text_is_an_unknown_key(tmp_path: Path, key: str, section: str) -> None:
    entry = f"{{{key}: 3}}" if section else f"{key}: 3"
    path = tmp_path / "run.yaml"
    path.write_text(f"{VALID}{f'{section}: {entry}' if section else entry}\n")
    with pytest.raises(ConfigError, match=f"unknown key; keys {'in run' if section else 'at the top'}"):
        load_config(path)
