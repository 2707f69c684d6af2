"""Shards and pack plans on disk, and the sample stream read from them: a pure function of the sample number."""
