"""Parts of a decoder that are computed by hand: attention with its kernel, pointwise operations, dropout."""
