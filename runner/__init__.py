"""Decides what to run: recipes, graph, cache, processes, tracking. No mathematics and no torch."""
