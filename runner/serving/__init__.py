"""Models to talk to: which there are, and the server that answers for them."""
