"""The `llamapro` command: one file per sub-command."""
