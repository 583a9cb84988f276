"""Bytes to objects and back: shards, index, commit record, objects document. Pure; specified in `proto/FORMAT.md`."""
