"""What tests share: tiny models, worker pools, independent readers."""
