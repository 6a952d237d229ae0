"""What a model learns from, as rows of tokens: conversations, packing, shards, batches."""
