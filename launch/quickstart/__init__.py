"""The whole path on a real small model, with one command: what `make quickstart` runs.

Every step is one of the public commands on files that stay for a look; only the materials (a model and two texts that
packages ship) are prepared here.
"""
