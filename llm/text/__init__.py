"""Text from files to a cleaned corpus: readers, cleaning, deduplication, and the work on shards that applies them."""
