"""Measurements of the machine and of promises: benchmarks, and the comparison of resumed with uninterrupted trainings."""
