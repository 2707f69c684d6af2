"""`python -m llamapro` is the `llamapro` command."""

import sys

from llamapro.cli.main import main

sys.exit(main())
