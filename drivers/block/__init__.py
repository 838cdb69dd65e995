"""The block layer: the node contract and the graph. No driver is imported here."""
