"""Experiments: methods compared on equal terms, each step run through the public commands, resumable."""
