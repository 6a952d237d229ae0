"""Text to tokens and back: byte-level BPE and chat templates."""
