"""`ckptsvc run` on one node: the keeper, the ranks it starts, their output, and whether the node is fit for them."""
