"""The decoder: `config` says its shape and options without torch, `model` computes it, `decode` one token at a time."""
