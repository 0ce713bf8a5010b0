"""Layers: the mixture of experts, attention, feed-forwards, norms, positions, and the stack of blocks."""
