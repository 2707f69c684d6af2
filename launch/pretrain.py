"""Train the inserted blocks of an expanded model: `deepspeed launch/pretrain.py --config RUN.yaml`."""

import sys

from llamapro.engine.environment import prepare_environment
from llamapro.training.startup_signals import retry_on_stop_signals

if __name__ == "__main__":
    retry_on_stop_signals()  # a job can be preempted while it imports
    prepare_environment()  # before torch and deepspeed are imported: both read it on import
    from llamapro.training.entry import main

    sys.exit(main("pretrain"))
