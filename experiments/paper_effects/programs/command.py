"""The command line that every program of this folder has."""
import argparse
import json
import pathlib
from collections.abc import Callable, Collection


def arguments(variants: Collection[str]) -> argparse.Namespace:
  """`--variant=V --seed=N --out=FOLDER`; the folder is there."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--variant', choices=variants, required=True)
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  given = parser.parse_args()
  given.out.mkdir(parents=True, exist_ok=True)
  return given


def main(measure: Callable[[str, int], dict[str, float]], variants: Collection[str]) -> None:
  """Writes what `measure(variant, seed)` returns to FOLDER/metrics.jsonl."""
  given = arguments(variants)
  write(given.out, measure(given.variant, given.seed))


def write(folder: pathlib.Path, measured: dict[str, float]) -> None:
  """One line of metrics.jsonl."""
  line = json.dumps({name: float(value) for name, value in measured.items()})
  (folder / 'metrics.jsonl').write_text(line + '\n')
