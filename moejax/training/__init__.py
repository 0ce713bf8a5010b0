"""Training: the loop, its step, optimizers and objectives, and (in `durability`) what a run survives."""
