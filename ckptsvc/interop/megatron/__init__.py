"""Megatron-Core's checkpoints: torch_dist, and the classic layout."""
