"""What `ckptsvc bench` measures, and how."""
