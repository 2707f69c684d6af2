"""A real Slurm on this host, as Debian packages it: one controller, two nodes, everything in one temporary folder.

Each node is a slurmd in a process namespace of its own, so that a node can die like a machine, and nothing survives the
fixture. Nodes are told that they have 64 cores and 8 GPUs, which nobody looks for.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llamapro.engine.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "unshare", "setpriv")
NODES = ("n1", "n2")
GPUS = 8
GRACE_SECONDS = 60
STARTING_SECONDS = 60.0
JOB_SECONDS = 300.0
POLL_SECONDS = 0.3
# A job of ours must not think that the test's own process is a rank of it.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "USER", "TMPDIR")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MessageTimeout=60
MinJobAge=7200
ReturnToService=2
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
GresTypes=gpu
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=64 RealMemory=1000 Gres=gpu:{gpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000 Gres=gpu:{gpus}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 MaxTime=2-00:00:00 PreemptMode=OFF State=UP
"""


class Slurm:
    """A running cluster. Made by `running_slurm`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start all daemons, wait until both nodes can be used."""
        self._configure()
        self._start_munge()
        self._spawn("slurmctld", "slurmctld", "-D")
        self._wait(lambda: "UP" in self.run("scontrol", "ping").stdout, "the controller answers")
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: all(self.node_state(node) == "IDLE" for node in NODES), "both nodes are idle")

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = free_ports(1 + len(NODES))
        text = CONFIGURATION.format(
            host=host, folder=self.folder, controller_port=controller, ports=ports, grace=GRACE_SECONDS, gpus=GPUS
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        # The nodes' names are addresses, as they are in a cluster.
        hosts = Path("/etc/hosts").read_text()
        (self.folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {' '.join(NODES)}\n")
        (self.folder / "state").mkdir()
        (self.folder / "ranks").mkdir()
        (self.folder / "mpi.conf").write_text(f"PMIxCliTmpDirBase={self.folder}/ranks\n")
        # The name by which Slurm opens the library is in Debian's package for developers only.
        shutil.copytree(pmix_folders()[0], self.folder / "pmix", symlinks=True)
        (self.folder / "pmix" / "libpmix.so").symlink_to("libpmix.so.2")

    def _start_munge(self) -> None:
        """Start the daemon that signs for this cluster, with a key of its own."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"socket": "socket", "key-file": "key", "seed-file": "seed", "log-file": "log", "pid-file": "pid"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *options)
        self._wait((self.folder / "munge.socket").exists, "munged listens")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd as the first process of a namespace."""
        own = self.folder / f"ranks-{node}"
        own.mkdir(exist_ok=True)
        mounts = {"hosts": "/etc/hosts", "pmix": pmix_folders()[0], own.name: self.folder / "ranks"}
        shown = " && ".join(f"mount --bind {self.folder}/{name} {place}" for name, place in mounts.items())
        namespace = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._spawn(node, *namespace, "bash", "-c", f"{shown} && exec slurmd -D -N {node}")

    def kill_node(self, node: str) -> None:
        """End everything on a node at once, as when its power fails."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        """End all daemons and what they started."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()

    def run(self, *command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run one of Slurm's commands."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )

    def submit(self, script: Path, *options: str, words: Sequence[str] = ()) -> str:
        """Submit a script with its arguments; returns the job's number."""
        done = self.run("sbatch", "--parsable", *options, str(script), *words, cwd=script.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        text = self.run("scontrol", "show", "job", number, "--oneliner").stdout
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def node_state(self, node: str) -> str:
        """State of a node, e.g. IDLE."""
        text = self.run("scontrol", "show", "node", node, "--oneliner").stdout
        return next((part.removeprefix("State=") for part in text.split() if part.startswith("State=")), "")

    def wait_for_job(self, number: str, state: str, seconds: float = JOB_SECONDS) -> None:
        """Wait until a job is in this state and nothing of it is still ending."""
        wait_until(lambda: self.job(number)["JobState"] == state, f"job {number} is {state}", seconds, self.story)

    def story(self) -> str:
        """What everyone said, for the message of a failed test."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, STARTING_SECONDS, self.story)

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@contextmanager
def running_slurm() -> Iterator[Slurm]:
    """A cluster while the block runs; its processes and its folder are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: the path of a socket is limited
    folder.chmod(0o755)
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


def why_not() -> str:
    """Why no Slurm can run here; empty when it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-packages-cluster.txt)"
    if not pmix_folders():
        return "not installed: libpmix2 (apt-packages-cluster.txt)"
    return "" if os.geteuid() == 0 else "starting slurmd needs root"


def pmix_folders() -> list[Path]:
    """Where the library lies through which Slurm serves MPI; empty where it is not installed."""
    return [library.parent for library in Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2")]


def wait_until(condition: Callable[[], bool], what: str, seconds: float, story: Callable[[], str] = lambda: "") -> None:
    """Wait for something; a failed test if it doesn't come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}\n{story()}"
        time.sleep(POLL_SECONDS)
