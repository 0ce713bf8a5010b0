"""'few_shot': linear separability of the features, from a few labelled examples per class.

Ridge regression in closed form on frozen features: targets +1 for the class and -1 for the others, features
standardised on the support examples, and a constant feature for the bias. This is the probe of V-MoE (Riquelme et al.
2021, arXiv 2106.05974, section 4) and of ViT before it, with one difference: they choose the regulariser by test
accuracy over nine datasets; here leave-one-out on the support examples chooses it, so no test labels are used.
"""
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax.config import ConfigError, at, config_path
from moejax.evaluation import passes
from moejax.evaluation.registry import EVALUATORS, Evaluator
from moejax.parallel import processes
from moejax.ranges import Count, Natural, NotEmpty

REGULARISERS = 2. ** np.arange(-10, 20)
# Large compared to standardised features, so that the regulariser hardly shrinks the bias.
BIAS = 100.


@EVALUATORS('few_shot')
def few_shot(*, pipeline, apply: Callable, mesh: Mesh, shots: Annotated[tuple[Count, ...], NotEmpty()] = (1, 5, 10, 25),
             support_split: str = 'train', split: str = 'test', seed: Natural = 0,
             batch_size: Count | None = None) -> Evaluator:
  """`<n>_shot_accuracy` on `split` for every n of `shots`, from the first n examples per class of the shuffled support.

  Config:
    shots: examples per class; one measurement for each int.
    support_split: split of the support examples.
    seed: seed of their order.
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.

  Raises:
    ConfigError: at the first call, which reads the split: a class has fewer examples than shots.
  """
  where = config_path()
  with at('.support_split'):
    support = passes.Split(pipeline, mesh, support_split, batch_size, needs=('label', 'valid'))
  test = passes.Split(pipeline, mesh, split, batch_size, needs=('label', 'valid'))
  features = passes.MeshProgram(lambda params, state, batch: _features(apply(params, state, batch), batch), mesh)
  chosen = []  # read at the first evaluation

  def evaluate(params, router_state):
    if not chosen:
      with at(where):
        chosen.extend(choose_support(support, max(shots), seed, mesh))
    rows, labels = _collect(features, params, router_state, chosen)
    test_rows, test_labels = _collect(features, params, router_state, test)
    rank = rank_in_class(labels)
    return {f'{n}_shot_accuracy': ridge_accuracy(rows[rank < n], labels[rank < n], test_rows, test_labels)
            for n in shots}
  return Evaluator(evaluate, ((features, test.spec),))


def choose_support(split: passes.Split, shots: int, seed: int, mesh: Mesh) -> list[dict[str, jax.Array]]:
  """Batches of the first `shots` examples of every class in shuffled order; a larger `shots` only extends them."""
  labels = np.concatenate([np.where(b['valid'], b['label'], -1) for b in split.host_batches(whole=True)])
  order = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
  order = order[rank_in_class(labels[order]) < shots]
  classes, counts = np.unique(labels[order], return_counts=True)
  if counts.min() < shots:
    raise ConfigError(f'.shots: class {classes[counts.argmin()]} has {counts.min()} examples, fewer than '
                      f'{shots} shots. Set fewer.')
  examples = _pick(split, order)
  rows = processes.local_rows(mesh, split.batch_size)
  return [processes.place(mesh, {name: padded(x[start:start + split.batch_size], split.batch_size)[rows]
                                 for name, x in examples.items()})
          for start in range(0, len(order), split.batch_size)]


def rank_in_class(labels: np.ndarray) -> np.ndarray:
  """<int>[N]: number of earlier entries with the same label."""
  rank = np.zeros(len(labels), int)
  for label in np.unique(labels):
    rank[labels == label] = np.arange((labels == label).sum())
  return rank


def ridge_accuracy(rows: np.ndarray, labels: np.ndarray, test_rows: np.ndarray, test_labels: np.ndarray) -> float:
  """Accuracy on `test_rows: [M,D]` of the ridge classifier fitted to `rows: [N,D]`, in float64."""
  rows, test_rows = standardise(rows, test_rows)
  classes = np.unique(labels)
  targets = np.where(labels[:, None] == classes, 1., -1.)
  weights = ridge(rows, targets, REGULARISERS)
  return float((classes[(test_rows @ weights).argmax(-1)] == test_labels).mean())


def standardise(rows: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """All arrays standardised by the mean and standard deviation of `rows`, with the constant feature appended."""
  mean, std = rows.astype(np.float64).mean(0), rows.astype(np.float64).std(0)
  std = np.where(std > 0, std, 1.)
  return [np.concatenate([(x - mean) / std, np.full((len(x), 1), BIAS)], 1) for x in (rows, *others)]


def ridge(rows: np.ndarray, targets: np.ndarray, regularisers: Sequence[float] | np.ndarray) -> np.ndarray:
  """argmin_w |rows w - targets|^2 + r |w|^2 as [D,N], for the r with the least squared leave-one-out residual.

  With rows = U S V', the residual of example i in a fit without it is e_i / (1 - h_i): e the residual of the full fit,
  h the diagonal of U S^2/(S^2+r) U'. Both are computed from the unfitted part, which stays exact where h is almost 1.
  """
  u, s, vt = np.linalg.svd(rows, full_matrices=False)
  coordinates = u.T @ targets
  outside = targets - u @ coordinates  # what no weights can fit
  slack = np.clip(1 - (u**2).sum(1), 0, None)

  def left_out(r):
    shrunk = r / (s**2 + r)
    residual = outside + u @ (shrunk[:, None] * coordinates)
    return np.mean((residual / (slack + u**2 @ shrunk)[:, None]) ** 2)

  best = min(regularisers, key=left_out)
  return vt.T @ ((s / (s**2 + best))[:, None] * coordinates)


def _features(output, batch):
  return output.features.astype(jnp.float32), jnp.where(batch['valid'], batch['label'], -1)


def _collect(features, params, router_state, batches):
  parts = [jax.device_get(features(params, router_state, batch)) for batch in batches]
  rows, labels = (np.concatenate(x) for x in zip(*parts))
  return rows[labels >= 0], labels[labels >= 0]


def _pick(split, indices):
  """`{name: [len(indices), ...]}`: the examples at these positions of the split."""
  found, position = {}, 0
  wanted = set(indices.tolist())
  for batch in split.host_batches(whole=True):
    for row in range(split.batch_size):
      if position + row in wanted:
        found[position + row] = {name: np.asarray(x[row]) for name, x in batch.items()}
    position += split.batch_size
  return {name: np.stack([found[i][name] for i in indices.tolist()]) for name in split.spec}


def padded(rows: np.ndarray, size: int) -> np.ndarray:
  """`rows: [n,...]` padded to `size` with zeros, so `valid` is False there."""
  return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
