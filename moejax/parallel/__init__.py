"""Parallelism: device meshes, logical axes to mesh axes, processes, and plans of runs on absent machines."""
