"""Ask the hosts of a job whether they fit together: `deepspeed --hostfile HOSTS launch/doctor.py [--folder RUNS]`.

The same as `llamapro doctor --distributed` under launchers that start commands.
"""

import sys

if __name__ == "__main__":
    from llamapro.cli.main import main

    sys.exit(main(["doctor", "--distributed", *sys.argv[1:]]))
