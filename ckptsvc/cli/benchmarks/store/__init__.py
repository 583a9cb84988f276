"""`ckptsvc bench store`: a store's driver beside the raw limit and other clients."""
