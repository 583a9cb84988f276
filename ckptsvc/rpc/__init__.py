"""The wire: stubs generated from `proto/`, and the channel (deadlines, status <-> errors)."""
