"""Sublayers that mix tokens."""
# Importing a sublayer registers it.
from moejax.layers.mixers import attention, lstm
