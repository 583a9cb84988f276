"""How a store is measured from this node, and which settings follow from that."""
