"""The cache: artifacts and records by key, locks and leases, integrity checks, garbage collection, and remote caches."""
