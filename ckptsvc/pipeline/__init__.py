"""Moving bytes under a budget: arena -> shard -> commit, and back. No torch here."""
