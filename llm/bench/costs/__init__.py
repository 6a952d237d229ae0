"""What a training costs: memory, time around its steps, and what its rows are worth and take to be read."""
