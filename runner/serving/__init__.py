"""Serving: the servable models of a recipe, and an OpenAI-compatible server for them."""
