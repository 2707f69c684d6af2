"""How well a model predicts text, and what each of its blocks adds: held-out loss, bits per byte, block bypass."""
