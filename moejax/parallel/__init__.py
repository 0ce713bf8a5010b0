"""Parallelism: device meshes, logical axes to mesh axes, processes, chips, and the FLOPs of traced programs."""
