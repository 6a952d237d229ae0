"""LLaMA: `config` says its shape without torch, `model` computes it."""
