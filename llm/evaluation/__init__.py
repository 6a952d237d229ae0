"""How good a model is: scores, comparisons and their intervals."""
