"""Recipes that somebody published: fetched, pinned and confirmed before they run."""
