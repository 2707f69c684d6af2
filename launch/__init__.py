"""What is launched: the fronts of training, the quickstart, recipes and batch scripts."""
