"""One pass over a split: runs the model on every batch and adds up exact sums over valid examples.

Evaluators define the sums. Batches have one shape, so the model is compiled once; the sums exclude padding, so metrics
do not depend on the batch size unless the model's outputs do (see `groups`).
"""
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.parallel import processes, rules

# (model output, batch) -> {name: sum over the valid part of the batch}
Statistics = Callable[[object, dict], dict[str, jax.Array]]

ROUTER_METRICS = ('load', 'dropped', 'confidence', 'entropy', 'experts_per_token')


class Split:
  """The batches of one split, on the devices.

  Args:
    pipeline: of `moejax.data`.
    mesh: shards the batch.
    split: one of `pipeline.splits`.
    batch_size: rows over all devices; the pipeline's own if None.
    needs: required batch keys.

  Raises:
    ConfigError: the split does not exist, a required key is missing, or the batch does not divide over the mesh.
  """

  def __init__(self, pipeline, mesh: Mesh, split: str, batch_size: int | None, needs: tuple[str, ...] = ()):
    self.spec = pipeline.batch_spec(batch_size)
    if split not in pipeline.splits:
      raise ConfigError(f': there is no split {split!r}. Allowed: {", ".join(pipeline.splits)}.')
    if not set(needs) <= set(self.spec):
      raise ConfigError(f' requires batches with {" and ".join(needs)}, but config.data gives '
                        f'{", ".join(sorted(self.spec))}. Choose an evaluator that fits the data.')
    self.batch_size = next(iter(self.spec.values())).shape[0]
    if self.batch_size % rules.batch_shards(mesh):
      raise ConfigError(f'.batch_size: {self.batch_size} examples do not divide over '
                        f'{rules.batch_shards(mesh)} shards of the batch. Use a multiple of that.')
    self._pipeline, self._mesh, self._split = pipeline, mesh, split

  def host_batches(self, *, whole: bool = False) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of every batch, or with `whole` all rows."""
    rows = None if whole else processes.local_rows(self._mesh, self.batch_size)
    yield from self._pipeline.evaluate(self._split, self.batch_size, rows)

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    for batch in self.host_batches():
      yield processes.place(self._mesh, batch)


class MeshProgram:
  """`function`, compiled under `mesh` at the first call, with results replicated on every device."""

  def __init__(self, function: Callable, mesh: Mesh):
    self._function, self._mesh, self._compiled = function, mesh, None

  def __call__(self, *args: Any) -> Any:
    with rules.use(self._mesh):
      self._compiled = self._compiled or processes.compiled(
          jax.jit(self._function, out_shardings=rules.replicated(self._mesh)), *args)
      return self._compiled(*args)

  def trace(self, *shapes: Any) -> None:
    """Traces the function with arguments of these shapes, to raise its errors."""
    with rules.use(self._mesh):
      jax.eval_shape(self._function, *shapes)


def totals(split: Split, apply: Callable, mesh: Mesh,
           statistics: Statistics) -> tuple[Callable[[Tree, Tree], dict], MeshProgram]:
  """A function `(params, router_state) -> {name: float64 sum over the split}`, and the program that it runs.

  The sums of `statistics`, plus `router/<layer>/<metric>`, which are means over the valid tokens of the split.
  """
  def batch_sums(params, router_state, batch):
    output = apply(params, router_state, batch)
    return statistics(output, batch), _router_sums(output.routers, batch)

  sums = MeshProgram(batch_sums, mesh)

  def run(params, router_state):
    total = None
    pending = None  # one batch is in flight while the sums of the previous one are fetched
    for batch in split:
      running, pending = pending, sums(params, router_state, batch)
      total = _add(total, running)
    total = _add(total, pending)
    if total is None:
      raise ValueError('the split has no batches.')
    statistics_total, router_total = total
    return {**statistics_total, **_router_means(router_total)}
  return run, sums


def _add(total, sums):
  if sums is None:
    return total
  sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
  return sums if total is None else jax.tree.map(np.add, total, sums)


def valid_tokens(batch: dict, layer: str) -> jax.Array:
  """<bool>[B] or [B,S]: False for padding among the tokens (or whole images) that `layer` routes."""
  if 'valid' in batch:
    return batch['valid'].astype(bool)
  if 'segments' in batch:
    return batch['segments'] > 0
  side = 'encoder' if layer.startswith('encoder') else 'decoder'
  return batch[f'{side}_segments'] > 0


def _router_sums(routers, batch):
  sums = {}
  for layer, router in routers.items():
    tokens = valid_tokens(batch, layer).sum().astype(jnp.float32)
    # A batch of only padding has no meaningful metrics, and 0 * nan is not 0.
    sums[layer] = {name: jnp.where(tokens > 0, router.metrics[name] * tokens, 0.)
                   for name in ROUTER_METRICS if name in router.metrics}
    sums[layer]['tokens'] = tokens
  return sums


def _router_means(sums):
  means = {}
  for layer, metrics in sums.items():
    for name in metrics:
      if name != 'tokens':
        means[f'router/{layer}/{name}'] = metrics[name] / max(metrics['tokens'], 1)
  return means


def router_scalars(totals: dict[str, np.ndarray]) -> dict[str, float]:
  """The router metrics in `totals` as scalars; `busiest` and `idlest` are the extreme loads, in multiples of 1/E."""
  scalars = {}
  for path, value in totals.items():
    layer, _, metric = path.rpartition('/')
    if not path.startswith('router/'):
      continue
    if metric == 'load':
      scalars[f'{layer}/busiest'] = float(value.max() * value.size)
      scalars[f'{layer}/idlest'] = float(value.min() * value.size)
    else:
      scalars[path] = float(value)
  return scalars
