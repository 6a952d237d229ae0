"""The cache: artifacts and records by key, who holds a key, what is damaged, what can go, and the cache elsewhere."""
