"""Generated from proto/ckptsvc/rpc/v1 by `make proto`; never edited by hand."""
