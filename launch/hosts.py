"""Start training on several hosts: `python -m launch.hosts --hostfile HOSTS launch/pretrain.py --config RUN.yaml`.

All options are those of `deepspeed`; secrets stay out of command lines and logs, and stopping saves.
"""

import sys

from llamapro import console

if __name__ == "__main__":
    from llamapro.engine.launcher import launch_on_hosts

    sys.exit(console.guarded(lambda: launch_on_hosts(sys.argv[1:]), debug=False))
