"""Plans of runs on absent machines: the compiled training step's memory, traffic, collectives and time, and advice."""
