"""From a checkpoint to another: planned, streamed within a budget of memory, resumed where it stopped."""
