"""Grow a pretrained language model into a new domain without losing what it knows."""

__version__ = "0.1.0"
