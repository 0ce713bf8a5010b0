"""What the programs of this folder share: their command line, a short training, and what they write."""
import argparse
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from moejax.training import setup, step


def main(measure: Callable[[str, int], dict[str, float]]) -> None:
  """`--variant=V --seed=N --out=FOLDER`: writes what `measure(variant, seed)` returns to FOLDER/metrics.jsonl."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--variant', required=True)
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  measured = measure(arguments.variant, arguments.seed)
  arguments.out.mkdir(parents=True, exist_ok=True)
  line = json.dumps({name: float(value) for name, value in measured.items()})
  (arguments.out / 'metrics.jsonl').write_text(line + '\n')


def train(config: Any, seed: int,
          batches: Iterable[dict] | None = None) -> Iterator[tuple[setup.Setup, step.TrainState]]:
  """The state before each step and after the last one; `batches` in the place of the config's own data."""
  config.seed = seed
  built = setup.prepare(config)
  state, take = step.init_state(built), step.make_train_step(built)
  stream = iter(built.pipeline.train(seed) if batches is None else batches)
  for _ in range(built.training.steps):
    yield built, jax.tree.map(lambda leaf: leaf.copy(), state)  # the step takes its argument's memory
    state, _ = take(state, built.place(next(stream)))
  yield built, state
