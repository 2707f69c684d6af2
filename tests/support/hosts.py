"""Several hosts on one machine: network namespaces with names and addresses of their own behind a switch, sshd in each.

Everything lives in namespaces and in one folder: nothing of the machine is changed, and nothing is left when it ends.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.source import ROOT

PREFIX = "llamapro"
PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "nsenter", "unshare", "pkill")
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SECONDS = 120.0
SSHD = """ListenAddress {address}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {key}.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
"""
SSH = """Host *
  IdentityFile {key}
  UserKnownHostsFile {known}
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  LogLevel ERROR
"""
# A private /run, because sshd wants a folder there; own names; keys that no one else has.
START = """set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
exec {sshd} -D -e -f {own}/sshd_config
"""


def obstacle() -> str:
    """Why hosts can't be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(missing)} (apt-packages-cluster.txt)" if missing else ""


class Hosts:
    """Running hosts n1, n2, …: run commands on them, cut and mend their links."""

    def __init__(self, folder: Path, daemons: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
        self.folder = folder
        self.names = list(daemons)
        self._daemons = daemons

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        """The words, to be run on a host in the folder that all share."""
        enter = ["nsenter", "--target", str(self._daemons[host].pid), "--net", "--uts", "--mount", "--"]
        return [*enter, "env", "--chdir", str(self.folder), *words]

    def environment(self, **variables: str) -> dict[str, str]:
        """A user's variables on a host: few, and none of this process's ranks."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return {"PATH": PATH, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}

    def run(self, host: str, *words: str, timeout: float = 600, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host to its end."""
        return subprocess.run(
            self.command(host, words),
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, host: str, log: Path, *words: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a command on a host, in a process group of its own; what it says goes into a file."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(host, words),
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def hostfile(self, name: str, **slots: int) -> str:
        """A hostfile in the shared folder; its path."""
        file = self.folder / f"hostfile-{name}"
        file.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
        return str(file)

    def cut(self, host: str) -> None:
        """Take the host's cable out."""
        ip("-n", namespace("switch"), "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Put it in again."""
        ip("-n", namespace("switch"), "link", "set", host, "up")

    def processes(self, host: str, word: str) -> dict[int, str]:
        """Command lines of the host's processes that have a word, by process id."""
        return {pid: line for pid, line in _command_lines(host).items() if word in line}


@contextmanager
def running_hosts(folder: Path, count: int) -> Iterator[Hosts]:
    """So many hosts, that share all files."""
    remove_leftovers()
    names = [f"n{number}" for number in range(1, count + 1)]
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    try:
        _write_keys(folder, names)
        _make_network(names)
        for name in names:
            daemons[name] = _start_daemon(folder, name)
        hosts = Hosts(folder, daemons)
        for name in names:
            _wait_for_daemon(hosts, name)
        yield hosts
    finally:
        for name in (*names, "switch"):
            _remove(namespace(name))
        for daemon in daemons.values():
            daemon.wait(SECONDS)


def namespace(name: str, pid: int | None = None) -> str:
    """The namespace of a host of this test process."""
    return f"{PREFIX}-{pid or os.getpid()}-{name}"


def address(name: str) -> str:
    return f"10.77.0.{name.removeprefix('n')}"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def remove_leftovers() -> None:
    """Namespaces of test processes that were killed."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        parts = name.split("-")
        if parts[0] == PREFIX and len(parts) == 3 and not Path("/proc", parts[1]).exists():
            _remove(name)


def _remove(name: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _write_keys(folder: Path, names: Sequence[str]) -> None:
    """One key that opens every host, a key of each host, and who has which."""
    key, known = folder / "key", folder / "known_hosts"
    _keygen(key)
    lines = []
    for name in names:
        own = folder / "sshd" / name
        own.mkdir(parents=True)
        _keygen(own / "host_key")
        (own / "sshd_config").write_text(SSHD.format(address=address(name), folder=own, key=key))
        lines.append(f"{name},{address(name)} {(own / 'host_key.pub').read_text()}")
    known.write_text("".join(lines))
    (folder / "ssh_config").write_text(SSH.format(key=key, known=known))
    table = "".join(f"{address(name)} {name}\n" for name in names)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{table}")


def _keygen(file: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(file)], check=True)


def _make_network(names: Sequence[str]) -> None:
    switch = namespace("switch")
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
    ip("-n", switch, "link", "set", "bridge0", "up")
    for name in names:
        own = namespace(name)
        ip("netns", "add", own)
        ip("link", "add", "eth0", "netns", own, "type", "veth", "peer", "name", name, "netns", switch)
        ip("-n", switch, "link", "set", name, "master", "bridge0", "up")
        ip("-n", own, "address", "add", f"{address(name)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", own, "link", "set", device, "up")


def _start_daemon(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    own = folder / "sshd" / name
    script = START.format(name=name, folder=folder, own=own, sshd=shutil.which("sshd", path=PATH))
    alone = ["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", script]
    with (own / "log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace(name), *alone],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_daemon(hosts: Hosts, name: str) -> None:
    end = time.monotonic() + SECONDS
    log = hosts.folder / "sshd" / name / "log"
    while not (log.parent / "sshd.pid").exists():
        assert time.monotonic() < end, f"sshd on {name} does not start: {log.read_text()}"
        time.sleep(0.05)
    done = hosts.run(hosts.names[0], "ssh", name, "hostname")
    assert (done.returncode, done.stdout.strip()) == (0, name), f"{done.stderr}\n{log.read_text()}"


def _command_lines(host: str) -> dict[int, str]:
    lines = {}
    for pid in ip("netns", "pids", namespace(host)).split():
        with suppress(OSError):
            lines[int(pid)] = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return lines
