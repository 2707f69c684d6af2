"""What a Dockerfile says, read as text: its instructions, and the single commands of its RUN lines."""

import re
from pathlib import Path

CONTINUED = re.compile(r"\\\n")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Keyword and arguments of every instruction, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in CONTINUED.sub(" ", "\n".join(lines)).splitlines():
        if line.strip():
            keyword, _, rest = line.partition(" ")
            found.append((keyword.upper(), " ".join(rest.split())))
    return found


def arguments_of(path: Path, keyword: str) -> list[str]:
    """The arguments of every instruction of one kind."""
    return [rest for name, rest in instructions(path) if name == keyword]


def run_commands(path: Path) -> list[str]:
    """Every command of the RUN instructions, in order."""
    return [command.strip() for rest in arguments_of(path, "RUN") for command in rest.split(" && ")]


def build_arguments(path: Path) -> dict[str, str]:
    """Name and default of every ARG."""
    pairs = (rest.partition("=") for rest in arguments_of(path, "ARG"))
    return {name: value.strip('"') for name, _, value in pairs}
