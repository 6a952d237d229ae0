"""What a run will do, why, and the estimated cost."""
