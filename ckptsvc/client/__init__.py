"""What runs in the training process: the state tree, staging, the session. The only torch code beside interop."""
