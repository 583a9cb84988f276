"""What is between memory and the durable store: other nodes' memory, parity, and this node's disk."""
