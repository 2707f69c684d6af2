"""Corpus in, dataset out: readers, tokenizer libraries, and the build that seals shards."""
