"""'label_error_rate': the most probable path against the transcript."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.evaluation import passes
from moejax.evaluation.registry import EVALUATORS, Evaluator
from moejax.layers import ctc
from moejax.ranges import Count


@EVALUATORS('label_error_rate')
def label_error_rate(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test',
                     batch_size: Count | None = None) -> Evaluator:
  """`label_error_rate` is total edits over total labels of the split, with greedy decoding and no language model;
  `accuracy` is the share of utterances without an error; `loss` is the CTC loss, averaged over utterances.

  Config:
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
  """
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('frames', 'segments', 'targets', 'loss_mask'))
  run, program = passes.totals(examples, apply, mesh, sums)

  def evaluate(params, router_state):
    totals = run(params, router_state)
    count = totals['examples']
    return {'label_error_rate': float(totals['edits'] / totals['labels']), 'accuracy': float(totals['correct'] / count),
            'loss': float(totals['loss'] / count), **passes.router_scalars(totals), 'examples': float(count)}
  return Evaluator(evaluate, ((program, examples.spec),))


def sums(output, batch) -> dict[str, jax.Array]:
  """Sums over the utterances of a batch; `output.logits: <float32>[B,S,V]`."""
  arguments = ctc.arguments(batch)
  targets, counted = arguments['targets'], arguments['counted']
  edits = ctc.edit_distance(*ctc.greedy(output.logits, arguments['frames']), targets, counted)
  valid = arguments['frames'].any(-1)
  values = {'edits': edits, 'labels': counted.sum(-1), 'correct': edits == 0,
            'loss': ctc.loss(output.logits, **arguments), 'examples': valid}
  return {name: jnp.where(valid, value, 0).sum().astype(jnp.float32) for name, value in values.items()}
