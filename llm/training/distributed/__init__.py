"""Training in several processes: what they tell each other, and weights that are sharded over them."""
