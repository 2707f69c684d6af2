"""Programs that nobody has read, run behind a boundary of the kernel's, and the proof that the boundary holds."""
