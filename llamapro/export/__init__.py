"""Results in the world's own format: plain Hugging Face folders, deltas against the base, model cards."""
