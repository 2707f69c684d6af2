"""Files that are either whole or absent: the only package that renames, fsyncs or deletes."""
