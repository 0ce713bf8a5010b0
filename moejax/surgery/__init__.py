"""Surgery: building models from the parameters of other models."""
