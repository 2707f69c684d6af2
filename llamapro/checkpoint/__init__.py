"""Checkpoints: named trainable state in safetensors and JSON, committed whole or not at all, loadable at any size."""
