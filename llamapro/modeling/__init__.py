"""A transformers model made ready for training: block kinds, frozen linears, attention, loss, what is trainable.

Knows nothing of ranks and nothing of DeepSpeed.
"""
