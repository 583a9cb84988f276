"""Bytes to objects and back: shards, index, commit record, objects document.

Pure: no I/O, no clock. What these modules read and write is specified in `proto/FORMAT.md`.
"""
