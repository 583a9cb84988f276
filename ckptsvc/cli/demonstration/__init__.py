"""What `ckptsvc demo` does, measures and shows."""
