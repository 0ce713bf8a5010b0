"""'language_model' and 'seq2seq': loss, perplexity and bits per byte of next-token prediction over one split."""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from moejax.evaluation import passes
from moejax.evaluation.registry import EVALUATORS, Evaluator
from moejax.ranges import Count


@EVALUATORS('language_model')
def language_model(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test',
                   batch_size: Count | None = None) -> Evaluator:
  """`loss` in nats per token, `perplexity`, `accuracy` and `bits_per_byte` over the tokens with `loss_mask` 1.

  Bits per byte compares models with different tokenizers: the total loss in bits over the bytes of raw text that the
  tokens stand for (batch key `target_bytes`).

  Config:
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
  """
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('targets', 'loss_mask'))
  return _evaluator(examples, apply, mesh, 'targets')


@EVALUATORS('seq2seq')
def seq2seq(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test',
            batch_size: Count | None = None) -> Evaluator:
  """As 'language_model', over the decoder's targets; `bits_per_byte` only if targets stand for bytes of text.

  Config:
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
  """
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('decoder_targets', 'loss_mask'))
  return _evaluator(examples, apply, mesh, 'decoder_targets')


def token_sums(output, batch, targets: str) -> dict[str, jax.Array]:
  """Sums over the tokens with `loss_mask` 1; `output.logits: <float32>[B,S,V]`, `batch[targets]: <int32>[B,S]`."""
  counted = batch['loss_mask'] > 0
  loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch[targets])
  sums = {'loss': loss, 'accuracy': jnp.argmax(output.logits, -1) == batch[targets], 'tokens': jnp.ones_like(loss)}
  if 'target_bytes' in batch:
    sums['bytes'] = batch['target_bytes']
  return {name: jnp.where(counted, x, 0).sum().astype(jnp.float32) for name, x in sums.items()}


def text_metrics(totals: dict[str, np.ndarray]) -> dict[str, float]:
  """Metrics from sums of `loss` (nats), `accuracy` (hits), `tokens` and, if known, `bytes`."""
  loss = totals['loss'] / totals['tokens']
  metrics = {'loss': loss, 'perplexity': np.exp(loss), 'accuracy': totals['accuracy'] / totals['tokens']}
  if totals.get('bytes', 0) > 0:
    metrics['bits_per_byte'] = totals['loss'] / math.log(2) / totals['bytes']
  return {name: float(value) for name, value in {**metrics, 'tokens': totals['tokens']}.items()}


def _evaluator(examples, apply, mesh, targets: str) -> Evaluator:
  run, program = passes.totals(examples, apply, mesh, lambda output, batch: token_sums(output, batch, targets))

  def evaluate(params, router_state):
    totals = run(params, router_state)
    return {**text_metrics(totals), **passes.router_scalars(totals)}
  return Evaluator(evaluate, ((program, examples.spec),))
