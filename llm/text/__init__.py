"""Text from many places to one cleaned corpus: reading, cleaning, duplicates, and the passes over shards between them."""
