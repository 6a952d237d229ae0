"""Optimizers: AdamW and Muon."""
