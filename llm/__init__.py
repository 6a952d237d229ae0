"""The model and its training, from text to weights. Recipes, caches and processes are in `runner`."""
