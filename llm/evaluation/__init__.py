"""Evaluation of models: scores, comparisons of two models, and resamples for their intervals."""
