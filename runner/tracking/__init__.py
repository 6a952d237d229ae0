"""Metrics of a running stage: the file they are written to, trackers that copy it, and curves drawn from it."""
