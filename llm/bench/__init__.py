"""Speed and memory on this machine, ours beside stock Transformers'. What runs it, and the table, are the runner's."""
