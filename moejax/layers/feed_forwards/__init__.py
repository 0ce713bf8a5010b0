"""Sublayers that transform each token."""
# Importing a sublayer registers it.
from moejax.layers.feed_forwards import dense, moe
