"""Layers: blocks as lists of branches, the sublayers in them (`mixers`, `feed_forwards`), and the stack of blocks."""
