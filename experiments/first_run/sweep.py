"""The cost of the README's first command: wall time of the process, and peak memory."""
from experiments.runner import Run


def sweep():
  yield Run('first command', 'configs/vmoe_digits.py', 0)
