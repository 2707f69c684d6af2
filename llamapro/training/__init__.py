"""A training run: facts, schedule, loop, guards, signals, metrics."""
