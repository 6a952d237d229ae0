"""Metrics of a running stage: written to a file, followed by trackers."""
