"""A run's report: one self-contained HTML page made from the files of its folder, and a small before/after picture."""
