"""Training on several machines: one coordinates, the others take part."""
