"""Short trainings of small models, whose every state can be looked at."""
import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from moejax.training import setup, step


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


def trained(config: Any, seed: int, batches: Iterable[dict] | None = None) -> tuple[setup.Setup, step.TrainState]:
  """The state after the last step of `train`."""
  return collections.deque(train(config, seed, batches), maxlen=1).pop()


def shrink(config: Any, steps: int) -> None:
  """Makes a decoder on dialogues as small as those of `claims.TINY_TEXT`, for so many steps."""
  config.model.dim = 64
  config.model.feed_forward.hidden = config.model.moe.experts.hidden = 128
  config.data.batch_size, config.data.length, config.training.steps = 16, 64, steps
