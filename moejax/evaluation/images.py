"""'accuracy': loss and accuracy of a classifier over one split."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moejax.config import ConfigError
from moejax.evaluation import passes
from moejax.evaluation.registry import EVALUATORS, Evaluator
from moejax.ranges import Count


@EVALUATORS('accuracy')
def accuracy(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test',
             batch_size: Count | None = None) -> Evaluator:
  """Means over the valid examples of `split`.

  Batches with `label` (one class each): `loss` is the softmax cross-entropy, `accuracy` top-1, and with more than five
  classes `top_5_accuracy`. Batches with `labels` (any number of classes each): `loss` is the sigmoid cross-entropy
  summed over classes, and `precision_at_1` the share of examples whose highest logit is one of their classes.

  Config:
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
  """
  spec = pipeline.batch_spec(batch_size)
  if 'label' not in spec and 'labels' not in spec:
    raise ConfigError(': the accuracy evaluator requires batches with label or labels, but config.data gives '
                      f'{", ".join(sorted(spec))}. For text, use language_model or seq2seq.')
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('valid',))
  run, program = passes.totals(examples, apply, mesh, single_label if 'label' in spec else multi_label)

  def evaluate(params, router_state):
    totals = run(params, router_state)
    count = totals.pop('examples')
    means = {name: float(value / count) for name, value in totals.items() if not name.startswith('router/')}
    return {**means, **passes.router_scalars(totals), 'examples': float(count)}
  return Evaluator(evaluate, ((program, examples.spec),))


def single_label(output, batch) -> dict[str, jax.Array]:
  """Sums over the valid examples; `label: <int32>[B]`, `output.logits: <float32>[B,N]`."""
  logits, label, valid = output.logits, batch['label'], batch['valid']
  hits = {'accuracy': jnp.argmax(logits, -1) == label}
  if logits.shape[-1] > 5:
    hits['top_5_accuracy'] = (jax.lax.top_k(logits, 5)[1] == label[:, None]).any(-1)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  return _sums({'loss': loss, **hits}, valid)


def multi_label(output, batch) -> dict[str, jax.Array]:
  """Sums over the valid examples; `labels: <float32>[B,N]` of zeros and ones, `output.logits: <float32>[B,N]`."""
  logits, labels, valid = output.logits, batch['labels'], batch['valid']
  best = jnp.argmax(logits, -1)[:, None]
  return _sums({'loss': optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1),
                'precision_at_1': jnp.take_along_axis(labels, best, axis=-1)[:, 0] > 0}, valid)


def _sums(values, valid):
  # `where` rather than a product: the loss of a padding example may not be finite.
  return {'examples': valid.sum().astype(jnp.float32), **{k: jnp.where(valid, v, 0.).sum() for k, v in values.items()}}
