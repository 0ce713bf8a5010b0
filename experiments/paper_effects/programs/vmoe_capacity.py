"""Trains a V-MoE with slots by position, then evaluates it with a quarter of them, in the order of `--variant`."""
import subprocess
import sys

from experiments.paper_effects.programs import command
from moejax import evaluate

PLACE = 'model.moe.router.place'


def main():
  given = command.arguments(('batch', 'position'))
  run = given.out / 'run'
  keys = {'seed': given.seed, f'{PLACE}.priority': 'position', 'training.steps': 300, 'evaluation.every': 300,
          'checkpoint.every': 300, 'optimizer.schedule.warmup': 50, 'report.at': 'never'}
  subprocess.run([sys.executable, '-m', 'moejax.train', '--config=configs/vmoe_digits.py', f'--workdir={run}',
                  *(f'--config.{key}={value}' for key, value in keys.items())], check=True)
  measured = evaluate.run(str(run), {f'{PLACE}.priority': given.variant, f'{PLACE}.eval_capacity_factor': 0.25})
  command.write(given.out, dict(accuracy=measured['test/accuracy']))


if __name__ == '__main__':
  main()
