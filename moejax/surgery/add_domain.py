"""Domains added to a DEMix model, and taken out of it (arXiv 2108.05036, section 5).

    config, params, state = add_domain(config, params, state, batches_of_the_new_domain)

DEMix-DAPT then trains the new expert alone, on text of its domain whose `tasks` are the new, highest number, with the
optimizer of the first training at a tenth of its rate, and

    config.optimizer.update(NEW_EXPERT_ALONE)
"""
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax import models
from moejax.evaluation import domains
from moejax.functional import Tree, flatten, unflatten
from moejax.surgery.extract_task import plain_copy

# Keys of config.optimizer. Parameters that are no expert's have no gradient, and experts of other domains none on text
# of the new one; what has no gradient may not decay either, so that nothing does. (The published code, where other
# experts are in other files, decays the new one by 0.1.)
NEW_EXPERT_ALONE = dict(gradient_scale=dict(parameters='^(?!.*moe/(experts|layers)/)', factor=0.), weight_decay=0.)


def add_domain(config: Mapping, params: Tree, state: Tree, batches: Iterable[Mapping]) -> tuple[dict, Tree, Tree]:
  """A model with one more domain, whose expert starts as that of the domain with the largest posterior.

  Args:
    config: `config.model` of a decoder with `papers.demix`.
    params, state: of that model.
    batches: text of the new domain, as of `posterior`.

  Returns:
    `(config, params, state)`; what it computes for the domains before is what it did.

  Raises:
    ValueError: it is no such model, or there is no text.
  """
  return copy_domain(config, params, state, int(posterior(config, params, state, batches).argmax()))


def copy_domain(config: Mapping, params: Tree, state: Tree, domain: int) -> tuple[dict, Tree, Tree]:
  """A model with one more domain, whose expert is in every layer a copy of that of `domain`.

  Raises:
    ValueError: it is no DEMix model, or has no such domain.
  """
  known = _domains(config)
  if not 0 <= domain < known:
    raise ValueError(f'config.model has domains 0 to {known - 1}, and no {domain} to copy.')
  return _resized(config, params, state, 1,
                  lambda leaf, axis: jnp.insert(leaf, known, jnp.take(leaf, domain, axis), axis))


def remove_domain(config: Mapping, params: Tree, state: Tree, domain: int) -> tuple[dict, Tree, Tree]:
  """A model without the expert of `domain`; the numbers of the domains after it are one lower.

  Raises:
    ValueError: it is no DEMix model, has no such domain, or no other.
  """
  known = _domains(config)
  if not 0 <= domain < known or known == 1:
    raise ValueError(f'config.model has domains 0 to {known - 1}, of which one must stay: {domain} cannot be taken out.')
  return _resized(config, params, state, -1, lambda leaf, axis: jnp.delete(leaf, domain, axis))


def posterior(config: Mapping, params: Tree, state: Tree, batches: Iterable[Mapping], decay: float = 0.3,
              evidence: domains.Evidence = 'previous_token') -> np.ndarray:
  """Which expert is nearest to a text: the moving average of posteriors at the end of its rows, from equal shares.

  That is the prior that the paper caches, of 100 rows of text that was held out.

  Args:
    batches: of a language model: `tokens`, `targets`, `positions`, `loss_mask`, and `segments` where rows are packed.
    decay: weight of the newest row.
    evidence: see `domains.mixture_weights`.

  Returns:
    <float64>[J], of the J domains.

  Raises:
    ValueError: it is no DEMix model, or there is no text.
  """
  known, apply = _domains(config), models.build(config).apply
  measure = jax.jit(lambda batch: domains.target_log_probs(
      apply, params, state, {**batch, 'tasks': jnp.zeros_like(batch['tokens'])}, range(known))[:3])
  prior = shares = np.full(known, 1 / known)
  for batch in batches:
    for log_probs, starts, mask in zip(*(np.asarray(x) for x in measure(dict(batch)))):
      if (mask > 0).any():
        weights = domains.mixture_weights(log_probs, starts, prior, evidence)
        prior = domains.moving_prior(prior, weights[:, mask > 0][:, -1], decay)
  if prior is shares:
    raise ValueError('there is no text of the new domain: no target of any batch has a loss_mask above 0.')
  return prior


def _domains(config: Mapping) -> int:
  moe = config.get('moe') or {}
  if config['name'] != 'decoder' or moe.get('router', {}).get('score', {}).get('name') != 'task':
    raise ValueError('config.model is no decoder with an expert for every domain: config.model.moe.router is not '
                     'papers.demix(...).')
  return moe['router']['score']['num_tasks']


def _resized(config, params, state, by, change):
  axes = flatten(models.build(config).axes)
  config = plain_copy(config)
  config['moe']['num_experts'] += by
  config['moe']['router']['score']['num_tasks'] += by
  changed = {path: change(leaf, axes[path].index('expert')) if 'expert' in axes[path] else leaf
             for path, leaf in flatten(params).items()}
  return config, unflatten(changed), state
