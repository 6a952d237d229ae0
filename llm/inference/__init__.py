"""Tokens and text from a model."""
