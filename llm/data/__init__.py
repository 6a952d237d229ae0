"""Training data as rows of tokens: conversations, truncation, packing, token shards, mixtures, batches."""
