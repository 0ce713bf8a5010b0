"""Trains a V-MoE with slots by position, then evaluates it with a quarter of them, given out as `--variant` says."""
import argparse
import json
import pathlib
import subprocess
import sys

from moejax import evaluate

PLACE = 'model.moe.router.place'


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--variant', choices=('batch', 'position'), required=True)
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  options = parser.parse_args()
  run = options.out / 'run'
  keys = {'seed': options.seed, f'{PLACE}.priority': 'position', 'training.steps': 300, 'evaluation.every': 300,
          'checkpoint.every': 300, 'optimizer.schedule.warmup': 50, 'report.at': 'never'}
  subprocess.run([sys.executable, '-m', 'moejax.train', '--config=configs/vmoe_digits.py', f'--workdir={run}',
                  *(f'--config.{key}={value}' for key, value in keys.items())], check=True)
  measured = evaluate.run(str(run), {f'{PLACE}.priority': options.variant, f'{PLACE}.eval_capacity_factor': 0.25})
  (options.out / 'metrics.jsonl').write_text(json.dumps({'accuracy': measured['test/accuracy']}) + '\n')


if __name__ == '__main__':
  main()
