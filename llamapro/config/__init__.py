"""The run configuration: one file per section, checked completely before anything runs. Free of torch."""
