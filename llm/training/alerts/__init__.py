"""What is watched while a model trains, and what is done about it. No torch: a recipe is read without it."""
