"""'domains': metrics of a language model per domain, and mixtures of its experts for unknown domains (DEMix).

Mixtures average the probabilities of whole models, with one pass per expert (arXiv 2108.05036, section 4).
"""
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.special import logsumexp

from moejax.config import ConfigError
from moejax.evaluation import passes
from moejax.evaluation.registry import EVALUATORS, Evaluator
from moejax.ranges import Above, AtMost, Count

Evidence = Literal['previous_token', 'all_tokens']
Prior = Literal['uniform', 'updating', 'cached']


@EVALUATORS('domains')
def domains(*, pipeline, apply: Callable, mesh: Mesh, split: str = 'test', batch_size: Count | None = None,
            mixture: Literal['oracle', 'uniform', 'posterior'] = 'oracle', evidence: Evidence = 'previous_token',
            prior: Prior = 'uniform', decay: Annotated[float, Above(0), AtMost(1)] = 0.3, cache_split: str = 'train',
            cached_rows: Count = 100, removed: Sequence[str] = ()) -> Evaluator:
  """The metrics of 'language_model', and `<domain>/loss` and `<domain>/perplexity` of each of the source's tasks.

  Config:
    mixture: 'oracle': the experts of the document's own domain; 'uniform': the mean probability over all experts;
      'posterior': weighted by `mixture_weights`.
    evidence: likelihood of the posterior: 'previous_token' as in kernelmachine/demix, or 'all_tokens', Bayes' rule
      (see `mixture_weights`).
    prior: prior of each measured domain: 'uniform'; 'updating': a moving average over its rows so far (`moving_prior`),
      as in the paper (the published code computes it, but evaluates with a uniform prior); 'cached': the average after
      `cached_rows` of the domain's rows in `cache_split`.
    decay: weight of the newest row in the moving average.
    removed: names of domains whose experts are removed, by a prior of zero.
    split: split to evaluate.
    batch_size: examples per batch; None: as in training.
    cache_split: split of the 'cached' prior.
    cached_rows: number of rows per domain for the 'cached' prior.
  """
  tasks = pipeline.source.tasks
  examples = passes.Split(pipeline, mesh, split, batch_size, needs=('targets', 'tasks', 'loss_mask'))
  unknown = sorted(set(removed) - set(tasks))
  if unknown or (removed and (mixture == 'oracle' or len(removed) >= len(tasks))):
    raise ConfigError(f'.removed: cannot remove {", ".join(removed)} from the domains {", ".join(tasks)} of the '
                      f'mixture {mixture!r}. Name some but not all of them, and a mixture other than "oracle".')
  experts = [task for task, name in enumerate(tasks) if name not in removed]
  measure = passes.MeshProgram(
      lambda params, router_state, batch: target_log_probs(
          apply, params, router_state, batch, None if mixture == 'oracle' else experts), mesh)
  uniform = np.full(len(experts), 1 / len(experts))
  cache = None
  if prior == 'cached':
    cache = passes.Split(pipeline, mesh, cache_split, batch_size, needs=('targets', 'tasks'))

  def rows(split, params, router_state):
    for batch in split:
      for row in zip(*(np.asarray(x) for x in jax.device_get(measure(params, router_state, batch)))):
        if (row[2] > 0).any():
          yield row

  def priors_of(params, router_state):
    priors, seen = dict.fromkeys(range(len(tasks)), uniform), np.zeros(len(tasks), int)
    for log_probs, starts, mask, task, _ in rows(cache, params, router_state) if cache else ():
      domain = _domain(task, mask)
      if seen[domain] < cached_rows:
        weights = mixture_weights(log_probs, starts, priors[domain], evidence)
        priors[domain] = moving_prior(priors[domain], weights[:, mask > 0][:, -1], decay)
      seen[domain] += 1
      if (seen >= cached_rows).all():
        break
    return priors

  def evaluate(params, router_state):
    priors = priors_of(params, router_state)
    totals = {domain: dict(loss=0., tokens=0., bytes=0.) for domain in range(len(tasks))}
    for log_probs, starts, mask, task, num_bytes in rows(examples, params, router_state):
      weights = np.ones((1, 1))
      if mixture != 'oracle':
        domain = _domain(task, mask)
        weights = (np.broadcast_to(uniform[:, None], log_probs.shape) if mixture == 'uniform' else
                   mixture_weights(log_probs, starts, priors[domain], evidence))
        if prior == 'updating':
          priors[domain] = moving_prior(priors[domain], weights[:, mask > 0][:, -1], decay)
      mixed = mixture_log_probs(log_probs, weights)
      for domain in np.unique(task[mask > 0]):
        here = (task == domain) & (mask > 0)
        for name, value in dict(loss=-mixed, tokens=np.ones_like(mixed), bytes=num_bytes).items():
          totals[domain][name] += float(value[here].sum())
    whole = {name: sum(total[name] for total in totals.values()) for name in totals[0]}
    metrics = {**_means(whole), 'tokens': whole['tokens']}
    if whole['bytes']:
      metrics['bits_per_byte'] = whole['loss'] / math.log(2) / whole['bytes']
    for domain, total in totals.items():
      metrics |= {f'{tasks[domain]}/{name}': value for name, value in _means(total).items() if total['tokens']}
    return metrics
  return Evaluator(evaluate, ((measure, examples.spec),))


def _means(totals: dict[str, float]) -> dict[str, float]:
  loss = totals['loss'] / max(totals['tokens'], 1)
  return {'loss': loss, 'perplexity': math.exp(loss)}


def target_log_probs(apply: Callable, params, router_state, batch: dict, experts: Sequence[int] | None):
  """The inputs of the mixtures.

  Returns:
    log_probs <float32>[B,J,S] of the targets when all tokens are sent to each of the J `experts`; if None, J = 1, with
    the tokens' own domains. Then starts <bool>[B,S], loss_mask, tasks and target_bytes of the batch.
  """
  def of(tasks):
    log_probs = jax.nn.log_softmax(apply(params, router_state, {**batch, 'tasks': tasks}).logits, axis=-1)
    return jnp.take_along_axis(log_probs, batch['targets'][..., None], axis=-1)[..., 0]
  tasks, counted = batch['tasks'], batch['loss_mask'] > 0
  passes = [tasks] if experts is None else [jnp.full_like(tasks, expert) for expert in experts]
  # Masked targets are not evidence either.
  log_probs = jnp.stack([jnp.where(counted, of(tasks), 0.) for tasks in passes], axis=1)
  return (log_probs, batch['positions'] == 0, batch['loss_mask'], tasks,
          batch.get('target_bytes', jnp.zeros_like(tasks)))


def mixture_weights(log_probs: np.ndarray, starts: np.ndarray, prior: np.ndarray, evidence: Evidence) -> np.ndarray:
  """Weights of the experts at every token of a row: `prior` times likelihood, normalised (DEMix, equation 4).

  'all_tokens': the likelihood of all earlier targets of the document, which is Bayes' rule; a document starts from the
  prior. 'previous_token': the likelihood of the last target alone; a document starts from equal weights of all experts
  with a nonzero prior, as in kernelmachine/demix.

  Args:
    log_probs: <float>[J,S] of the targets.
    starts: <bool>[S]: whether the token is the first of its document.
    prior: <float>[J].
    evidence: one of the above.

  Returns:
    <float64>[J,S], each column summing to 1.
  """
  log_probs = np.asarray(log_probs, np.float64)
  with np.errstate(divide='ignore'):
    log_prior, log_equal = np.log(prior), np.log(prior > 0)
  weights = np.empty_like(log_probs)
  likelihood = np.zeros(len(prior))
  for position, first in enumerate(starts):
    likelihood = np.zeros(len(prior)) if first else likelihood
    at_start = first or position == 0
    weights[:, position] = likelihood + (log_equal if at_start and evidence == 'previous_token' else log_prior)
    newest = log_probs[:, position]
    likelihood = newest if evidence == 'previous_token' else likelihood + newest
  return np.exp(weights - logsumexp(weights, axis=0))


def mixture_log_probs(log_probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """`log sum_j w_j p_j`. `log_probs`: <float>[J,S], `weights`: <float>[J,S] -> <float64>[S]."""
  return np.asarray(logsumexp(np.asarray(log_probs, np.float64), b=weights, axis=0))


def moving_prior(prior: np.ndarray, posterior: np.ndarray, decay: float) -> np.ndarray:
  """`(1 - decay) prior + decay posterior`: the next prior, from the posterior at the last token of a row."""
  return (1 - decay) * prior + decay * posterior


def _domain(task: np.ndarray, mask: np.ndarray) -> int:
  # A row of documents of several domains counts for the domain with the most tokens.
  return int(np.bincount(task[mask > 0]).argmax())
