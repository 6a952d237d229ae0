"""What is tried before the first step of a training, so that a fault costs seconds."""
