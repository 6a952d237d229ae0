"""Recipes: reading and merging TOML, validation, expansion into ordinary stages, and the schema."""
