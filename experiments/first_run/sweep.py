"""What does the first command of the README cost, in wall time and peak memory?"""
from experiments.runner import Run


def sweep():
  yield Run('first command', 'configs/vmoe_digits.py', 0)
