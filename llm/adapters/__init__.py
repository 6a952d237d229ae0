"""Low-rank adapters: trained beside frozen weights, merged into them."""
