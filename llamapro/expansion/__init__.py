"""Block expansion on disk: layout, families, the record, expand and verify. Works on bytes in files."""
