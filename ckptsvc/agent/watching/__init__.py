"""What is seen of ranks and network cards from outside: heartbeat pages, /proc, stacks, counters."""
