"""PyTorch's distributed checkpoints (torch.distributed.checkpoint)."""
