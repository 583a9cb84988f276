"""`ckptsvc bench faults`: a small real job, hurt in every way of the fault matrix."""
