"""Train the inserted blocks of an expanded model: `deepspeed launch/pretrain.py --config RUN.yaml`."""

import sys

from llamapro.engine.environment import prepare_environment

if __name__ == "__main__":
    prepare_environment()  # before torch and deepspeed are imported: both read it on import
    from llamapro.training.entry import main

    sys.exit(main("pretrain"))
