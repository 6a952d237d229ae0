"""Decides what to run: recipes, graph, cache, processes, tracking. No mathematics and no torch."""

import os

# None are used, and looking for them means reading about every installed package: a tenth of the time of planning.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
