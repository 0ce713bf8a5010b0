"""Checkpoints as {path: array}: which array of another model each parameter starts from, and what is done to it."""
