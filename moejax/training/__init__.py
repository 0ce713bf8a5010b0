"""Training: the loop, its step, optimizers and objectives, checkpoints, and recovery."""
