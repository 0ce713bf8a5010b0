"""Draws figure.png from results.json: accuracy of every run, by model. `python -m experiments.digits.plot`"""
from experiments.plotting import save, strip

if __name__ == '__main__':
  save('digits', strip('digits', 'eval/test/accuracy', 'test accuracy', percent=True))
