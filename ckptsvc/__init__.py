"""ckptsvc: asynchronous sharded checkpoints and fault tolerance for large PyTorch jobs."""
