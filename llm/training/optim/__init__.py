"""Optimizers: AdamW, which is torch's, and Muon."""
