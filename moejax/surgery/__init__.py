"""Surgery: models made of the parameters of other models."""
