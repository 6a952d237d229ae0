"""The training loop, the only one, and its parts."""
