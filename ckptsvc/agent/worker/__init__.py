"""The I/O workers: a process for each job that does all that touches its store, and the agent's side of it."""
