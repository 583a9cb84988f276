"""The per-node service: owns the arenas, saves what is staged, watches the ranks, and may be the coordinator."""
