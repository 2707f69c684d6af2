"""docs/containers.md says what the files say: arguments and defaults, paths inside the image, the user, the checks."""

import importlib
import re
import shlex

from tests.docker.test_dockerfile import APPTAINER, DOCKERFILE
from tests.support.dockerfile import arguments_of, build_arguments
from tests.support.source import ROOT

PAGE = (ROOT / "docs" / "containers.md").read_text()
IN_IMAGE = "/opt/llamapro/launch/"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def options(command: list[str], name: str) -> list[str]:
    return [value for option, value in zip(command, command[1:], strict=False) if option == name]


def test_the_table_has_every_argument_with_its_default() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]+)`|empty) \|", PAGE, re.MULTILINE)
    assert dict(rows) == build_arguments(DOCKERFILE)


def test_builds_name_files_and_arguments_that_are_there() -> None:
    builds = [command for command in commands() if command[1] == "build"]
    assert {command[0] for command in builds} == {"docker", "apptainer"}
    for command in builds:
        given = {value.partition("=")[0] for value in options(command, "--build-arg")}
        assert given <= set(build_arguments(DOCKERFILE))
        file = ROOT / (command[-1] if command[0] == "apptainer" else options(command, "--file")[0])
        assert file in (DOCKERFILE, APPTAINER)


def test_what_is_run_is_there() -> None:
    scripts = re.findall(rf"{IN_IMAGE}(\S+\.py)", PAGE)
    assert scripts
    assert [script for script in scripts if not (ROOT / "launch" / script).is_file()] == []
    assert any(rest.endswith(IN_IMAGE.rstrip("/")) for rest in arguments_of(DOCKERFILE, "RUN"))
    modules = [name.removeprefix("llamapro.") for name in re.findall(r"python -m (llamapro\.launch\S+?)`", PAGE)]
    assert modules
    assert [name for name in modules if not (ROOT / name.replace(".", "/") / "__main__.py").is_file()] == []
    for name in set(re.findall(r"llamapro llamapro (\w+)|\.sif llamapro (\w+)", PAGE)):
        importlib.import_module(f"llamapro.cli.{''.join(name)}")


def test_the_user_and_the_intervals_are_the_files_own() -> None:
    (user,) = arguments_of(DOCKERFILE, "USER")
    assert f"`--user` it is {user.partition(':')[0]}, not root" in PAGE
    (health,) = arguments_of(DOCKERFILE, "HEALTHCHECK")
    (minutes,) = re.findall(r"--interval=(\d+)m", health)
    assert f"runs every {minutes} minutes" in PAGE


def test_settings_of_the_image_are_told() -> None:
    final = arguments_of(DOCKERFILE, "ENV")[-1]
    assert "`NCCL_DEBUG=WARN`" in PAGE
    assert "NCCL_DEBUG=WARN" in final
    assert "`HOME` is `/tmp`" in PAGE
    assert "HOME=/tmp" in final
