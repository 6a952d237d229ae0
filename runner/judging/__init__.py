"""What a recipe demands of scores, and the verdicts."""
