"""What runs inside the sandbox: limits itself, runs the program it is told, ends with the agreed exit status.

Its text is handed to a bare interpreter, so it uses the standard library alone. The status is agreed with the parent
for this one program: a program that leaves early, with whatever status, has not passed.
"""

import json
import os
import resource
import sys


def run() -> None:
    """Read {limits, program, status} from standard input; leave with `status` when the program runs to its end."""
    with sys.stdin.buffer as pipe:
        order = json.loads(pipe.read())
    for name, limit in order["limits"].items():
        _, hard = resource.getrlimit(kind := getattr(resource, name))
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (most, most))
    exec(compile(order["program"], "program.py", "exec"), {})
    os._exit(order["status"])


if __name__ == "__main__":
    run()
