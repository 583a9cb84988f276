"""The store drivers that ship with ckptsvc; each registers through the entry-point group `ckptsvc.storage`."""
