"""What does the first command of the README cost: time of the whole process, and peak memory?"""
from experiments.runner import Run


def sweep():
  yield Run('first command', 'configs/vmoe_digits.py', 0)
