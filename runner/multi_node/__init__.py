"""Several machines that train together: one coordinates, the others take part."""
