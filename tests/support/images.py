"""Images built and run without a daemon: buildah on a base made of Debian's packages, all in one private folder.

How pip reaches its packages here is mounted while something runs and is never part of an image.
"""

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAMS = ("buildah", "debootstrap")
BASE = "localhost/base:latest"
SHOWN_LINES = 60
CERTIFICATES = "/etc/pip-certificates.pem"


def why_not() -> str | None:
    """What is missing here for building an image, or None."""
    if os.geteuid() != 0:
        return "building an image without a daemon needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)} (apt-packages-cluster.txt)" if missing else None


class Images:
    """Images and containers of one folder.

    Everything runs in a chroot: the network, the processes and /dev are the machine's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.mounts = pip_mounts(folder)

    def command(self, *arguments: str | Path) -> list[str]:
        """A buildah command line on this folder."""
        storage = ["--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", "vfs"]
        return ["buildah", *map(str, storage), *map(str, arguments)]

    def buildah(self, *arguments: str | Path) -> str:
        """Run buildah to its end; returns what it printed, its last lines are the failure's message."""
        return self.must([*self.command(*arguments)])

    def must(self, command: Sequence[str]) -> str:
        """Run a command that has to succeed; returns its output."""
        done = subprocess.run(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        tail = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{tail}"
        return done.stdout

    def environment(self) -> dict[str, str]:
        """buildah's environment: the machine's path and no setting of this shell."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.temporary),
            "TMPDIR": str(self.temporary),
            "BUILDAH_ISOLATION": "chroot",
        }

    def bootstrap(self, release: str) -> None:
        """Make the image `BASE`: a release's smallest system, as the distribution's own small image has."""
        self.buildah("from", "--name", "bootstrap", "scratch")
        root = self.buildah("mount", "bootstrap").strip()
        # In a mount namespace of its own: what it mounts is gone with it, however it ends.
        self.must(["unshare", "--mount", "debootstrap", "--variant=minbase", release, root])
        shutil.rmtree(Path(root, "var/cache/apt/archives"))
        self.buildah("umount", "bootstrap")
        self.buildah("commit", "--quiet", "--rm", "bootstrap", BASE)

    def build(self, context: Path, dockerfile: Path, name: str, **arguments: str) -> None:
        """Execute a Dockerfile's steps."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        options = ["--format=docker", "--layers=false", "--force-rm", "--pull-never", *given, *self.mounts]
        self.buildah("build", *options, f"--file={dockerfile}", f"--tag={name}", context)

    def start(self, image: str, container: str) -> None:
        """A container of an image; nothing runs in it yet."""
        self.buildah("from", "--pull-never", "--name", container, image)

    def configuration(self, image: str) -> dict[str, Any]:
        """What the image says about itself: user, entry point, health check and so on."""
        inspected = json.loads(self.buildah("inspect", "--type", "image", image))
        found: dict[str, Any] = inspected["Docker"]["config"]
        return found

    def in_container(self, container: str, user: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in a container as a user, who needs no account there."""
        return self.command("run", f"--user={user}:{user}", *self.mounts, container, "--", *command)

    def root_of(self, container: str) -> Path:
        """A container's files."""
        return Path(self.buildah("mount", container).strip())

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder)


def pip_mounts(folder: Path) -> list[str]:
    """Mounts that let pip in a container reach what pip reaches here: its settings, and the local files they name."""
    settings = pip_settings()
    places = {
        place: place for name, value in settings.items() for word in value.split() if (place := local(name, word))
    }
    if certificates := local("cert", settings.get("cert", "")):
        places[certificates] = Path(CERTIFICATES)  # its own place belongs to a package that replaces it
        settings["cert"] = CERTIFICATES
    parser = configparser.RawConfigParser()
    parser["global"] = {name: value.replace("\n", " ") for name, value in settings.items()}
    with (folder / "pip.conf").open("w") as file:
        parser.write(file)
    places[folder / "pip.conf"] = Path("/etc/pip.conf")
    return [f"--volume={source}:{target}:ro" for source, target in sorted(places.items())]


def pip_settings() -> dict[str, str]:
    """pip's settings on this machine by option; the environment goes before files, as in pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def local(name: str, word: str) -> Path | None:
    """The file or folder of this machine that a word of a setting names; a local index lies beside its files."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return None
    return path.parent if name.endswith("index-url") else path
