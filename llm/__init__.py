"""The model and how it learns, from text to weights. Knows nothing of recipes, caches and processes."""
