"""The boundary is tried before it is trusted: programs that run to their end only where they get out.

Each probe also succeeds without a sandbox (the tests show it), so a probe that fails inside was stopped by the
boundary and not by a mistake of its own.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamapro.evaluation.sandbox.run import Limits, SandboxRefused, Verdict, run_program

SELF_TEST_LIMITS = Limits(seconds=20.0)
WORKS = "import heapq, json, math, re, tempfile\nassert sum(range(10)) == 45\nopen('/tmp/note', 'w').write('fine')"
FORGED_SUCCESSES = {
    "leaving early": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "raising SystemExit": "raise SystemExit",
    "killing itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "writing a success": "import os\nos.write(1, b'passed 0')\nos._exit(0)",
    "failing": "assert False",
}
FORKS = """
import os, signal
children = []
try:
    while len(children) < 100:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        children.append(child)
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


@contextmanager
def escapes() -> Iterator[dict[str, str]]:
    """Programs by what they try; they aim at this process and at a listener that lives as long as the context."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
        name = f"llamapro-{os.getpid()}-{listener.getsockname()[1]}"
        local.bind(f"\0{name}")
        local.listen()
        yield _files() | _network(listener.getsockname()[1], name) | _processes() | _resources()


def require_sandbox() -> None:
    """Try every escape.

    Raises:
        SandboxRefused: one worked, or an honest program did not; names it.
    """
    if run_program(WORKS, SELF_TEST_LIMITS) is not Verdict.PASSED:
        raise SandboxRefused(
            "generated programs can't be run: bubblewrap can't make the sandbox here. Unprivileged user namespaces may "
            "be switched off (sysctl kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces), or this "
            "is a chroot or a container without them"
        )
    with escapes() as programs:
        for aim, program in (FORGED_SUCCESSES | programs).items():
            if run_program(program, SELF_TEST_LIMITS) is Verdict.PASSED:
                raise SandboxRefused(f"the sandbox does not hold on this machine: {aim} worked in it")


def _files() -> dict[str, str]:
    return {
        "reading the accounts": "open('/etc/passwd').read()\nimport os\nos.getuid() or open('/etc/shadow').read()",
        "listing the host's root": "import os\nassert os.listdir('/etc')",
        "reading the home folder": f"import os\nassert os.listdir({str(Path.home())!r})",
        "reading the project": f"open({__file__!r}).read()",
        "writing a system file": "import os\npath = '/usr/llamapro-probe'\nopen(path, 'w').close()\nos.remove(path)",
        "reading the environment": "import os\nassert os.environ['PATH']",
    }


def _network(port: int, abstract_name: str) -> dict[str, str]:
    return {
        "connecting to this machine": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
        # Only looks for a way: no packet leaves.
        "reaching another network": (
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
        ),
        "connecting to a local socket": f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{abstract_name}')",
    }


def _processes() -> dict[str, str]:
    return {
        "reading another process": f"open('/proc/{os.getpid()}/cmdline').read()",
        "signalling another process": f"import os\nos.kill({os.getpid()}, 0)",
        "making a user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    }


def _resources() -> dict[str, str]:
    return {
        "using 2 GiB of memory": "block = bytearray(2 << 30)",
        "writing a file of 200 MiB": "import tempfile\ntempfile.TemporaryFile().truncate(200 << 20)",
        "filling the disk": (
            "import tempfile\nfiles = [tempfile.TemporaryFile() for _ in range(3)]\n"
            "for file in files:\n    file.write(bytes(32 << 20))\n    file.flush()"
        ),
        "starting 100 processes": FORKS,
    }
