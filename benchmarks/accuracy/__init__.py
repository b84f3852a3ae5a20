"""How good merges are: scores on the shipped example."""
