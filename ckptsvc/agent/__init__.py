"""The per-node service: owns the arenas, saves what is staged, watches the ranks, and may be the coordinator."""

import os

# Before grpc is imported: it writes a line to standard error for every connection that is no agent's.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
