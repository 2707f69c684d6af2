"""The image's recipe keeps the rules for such files, takes only what it names, and its two forms say the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dockerfile import arguments_of, build_arguments, instructions, run_commands
from tests.support.source import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
APPTAINER = ROOT / "docker" / "apptainer.def"
HADOLINT = Path(sys.executable).with_name("hadolint")
# A package of a stable distribution can't be pinned: the archive keeps one version and replaces it.
LEFT_OUT = {"DL3008"}
# Rule → a line that breaks it, put into the final stage.
BREACHES = {
    "DL3000": "WORKDIR workspace",
    "DL3002": "USER root",
    "DL3003": "RUN cd /tmp && ls",
    "DL3009": "RUN apt-get update && apt-get install --yes --no-install-recommends tini=0.19.0",
    "DL3013": "RUN pip install --no-cache-dir torch",
    "DL3015": "RUN apt-get update && apt-get install --yes tini=0.19.0 && rm -rf /var/lib/apt/lists/*",
    "DL3020": "ADD pyproject.toml /tmp/",
    "DL3025": "CMD llamapro doctor",
    "DL3042": "RUN pip install --constraint constraints.txt torch",
    "DL4006": "RUN cat /etc/passwd | wc -l",
}


def lint(path: Path) -> dict[str, str]:
    """Rule → message of everything hadolint finds."""
    command = [str(HADOLINT), "--format", "json", "--no-fail", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {found["code"]: found["message"] for found in json.loads(done.stdout)}


def test_no_rule_is_broken() -> None:
    assert lint(DOCKERFILE) == {}


def test_rules_are_left_out_for_a_reason_only() -> None:
    assert set(re.findall(r"\b(?:DL|SC)\d{4}\b", DOCKERFILE.read_text())) == LEFT_OUT


@pytest.mark.parametrize("rule", BREACHES)
def test_a_broken_rule_would_be_found(rule: str, tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(f"{DOCKERFILE.read_text()}{BREACHES[rule]}\n")
    assert rule in lint(broken)


def test_every_stage_is_the_base_that_was_asked_for() -> None:
    assert [stage.split()[0] for stage in arguments_of(DOCKERFILE, "FROM")] == ["${BASE}", "${BASE}"]


def test_the_base_is_one_release() -> None:
    name, _, tag = build_arguments(DOCKERFILE)["BASE"].partition(":")
    assert name
    assert re.match(r"\d+\.\d+", tag), f"{tag!r} is no version"


def test_nothing_comes_from_an_address() -> None:
    assert "://" not in "\n".join(f"{keyword} {rest}" for keyword, rest in instructions(DOCKERFILE))
    assert arguments_of(DOCKERFILE, "ADD") == []


def test_packages_have_the_versions_of_the_tests() -> None:
    installs = [command for command in run_commands(DOCKERFILE) if command.startswith("pip install")]
    assert len(installs) == 3
    assert [command for command in installs if "--constraint constraints.txt" not in command] == []


def test_it_runs_as_a_fixed_user_who_is_not_root() -> None:
    (user,) = arguments_of(DOCKERFILE, "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)


def test_signals_and_health() -> None:
    (entry,) = arguments_of(DOCKERFILE, "ENTRYPOINT")
    assert json.loads(entry) == ["/usr/bin/tini", "-g", "--"]
    (health,) = arguments_of(DOCKERFILE, "HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["llamapro", "doctor"]


def test_no_secret_can_be_a_build_argument() -> None:
    assert set(build_arguments(DOCKERFILE)) == {"BASE", "TORCH_INDEX", "EXTRAS"}


def copied() -> set[str]:
    """What the image takes from the repository."""
    rests = [rest for rest in arguments_of(DOCKERFILE, "COPY") if "--from=" not in rest]
    return {source.partition("/")[0] for rest in rests for source in rest.split()[:-1]}


def test_the_context_is_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__"]


def test_what_is_copied_is_what_the_package_is_made_of() -> None:
    assert [name for name in copied() if not (ROOT / name).exists()] == []
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages == {name for name in copied() if (ROOT / name).is_dir()}


def sections() -> dict[str, list[str]]:
    """Section of the Apptainer file → its lines, continued ones joined; the head is ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in APPTAINER.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("%"):
            name = line.strip()
            found[name] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[name].append(" ".join(line.split()))
    return found


def test_both_files_have_the_same_arguments() -> None:
    defaults = dict(line.split("=", 1) for line in sections()["%arguments"])
    assert defaults == build_arguments(DOCKERFILE)
    assert sections()[""] == ["Bootstrap: docker", "From: {{ BASE }}"]
    assert set(re.findall(r"{{ (\w+) }}", APPTAINER.read_text())) == set(defaults)


def test_both_files_take_the_same_files() -> None:
    assert {line.split()[0] for line in sections()["%files"]} == copied()
    assert [line for line in sections()["%files"] if line.split()[1] != f"/source/{line.split()[0]}"] == []


def test_both_files_run_the_same_commands() -> None:
    only_docker = ("useradd ", "install --directory ")  # a user and a folder of the image's own
    wanted = [command for command in run_commands(DOCKERFILE) if not command.startswith(only_docker)]
    assert wanted
    assert [command for command in wanted if command not in sections()["%post"]] == []


def test_both_files_set_the_same_environment() -> None:
    final = " ".join(arguments_of(DOCKERFILE, "ENV")[-1:])
    for line in sections()["%environment"]:
        name = line.removeprefix("export ").partition("=")[0]
        assert f"{name}=" in final


def test_the_site_decides_about_the_network() -> None:
    assert re.findall(r"\b(?:NCCL|GLOO|TORCH_NCCL)_\w+", " ".join(arguments_of(DOCKERFILE, "ENV"))) == ["NCCL_DEBUG"]
