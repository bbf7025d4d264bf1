"""Training: the recipe of the embedded model."""
