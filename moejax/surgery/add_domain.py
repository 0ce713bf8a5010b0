"""Adding domains to a DEMix model, and removing them (arXiv 2108.05036, section 5).

    config, params, state = add_domain(config, params, state, batches_of_the_new_domain)

DEMix-DAPT then trains only the new expert, on text of its domain (`tasks`: the new, highest number), with the original
optimizer at a tenth of its learning rate, and

    config.optimizer.update(new_expert_alone(config.model))
"""
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax import models
from moejax.evaluation import domains
from moejax.functional import Tree, expert_paths, flatten, unflatten
from moejax.surgery.extract_task import plain_copy


def new_expert_alone(config: Mapping) -> dict:
  """Keys of config.optimizer that train only the new domain's expert of `config`, a `config.model`.

  Gradients of parameters outside of experts are set to zero; those of other domains' experts are zero on text of the new
  domain. None of these may decay, so weight decay is off. (The published code, which keeps the other experts in separate
  files, decays the new one by 0.1.)
  """
  experts = '|'.join(map(re.escape, sorted(expert_paths(models.build(config).axes))))
  return dict(gradient_scale=dict(parameters=f'^(?!({experts})$)', factor=0.), weight_decay=0.)


def add_domain(config: Mapping, params: Tree, state: Tree, batches: Iterable[Mapping]) -> tuple[dict, Tree, Tree]:
  """A model with one more domain, whose expert is initialised from the domain with the largest posterior.

  Args:
    config: `config.model` of a decoder with `papers.demix`.
    params, state: of that model.
    batches: text of the new domain, as for `posterior`.

  Returns:
    `(config, params, state)`; its outputs for the old domains are unchanged.

  Raises:
    ValueError: it is not a DEMix model, or there is no text.
  """
  return copy_domain(config, params, state, int(posterior(config, params, state, batches).argmax()))


def copy_domain(config: Mapping, params: Tree, state: Tree, domain: int) -> tuple[dict, Tree, Tree]:
  """A model with one more domain, whose experts are copies of those of `domain` in every layer.

  Raises:
    ValueError: it is not a DEMix model, or has no such domain.
  """
  known = _domains(config)
  if not 0 <= domain < known:
    raise ValueError(f'config.model has domains 0 to {known - 1}, but no domain {domain} to copy.')
  return _resized(config, params, state, 1,
                  lambda leaf, axis: jnp.insert(leaf, known, jnp.take(leaf, domain, axis), axis))


def remove_domain(config: Mapping, params: Tree, state: Tree, domain: int) -> tuple[dict, Tree, Tree]:
  """A model without the experts of `domain`; the numbers of later domains decrease by one.

  Raises:
    ValueError: it is not a DEMix model, has no such domain, or no other domain.
  """
  known = _domains(config)
  if not 0 <= domain < known or known == 1:
    raise ValueError(f'config.model has domains 0 to {known - 1} and must keep one: domain {domain} cannot be removed.')
  return _resized(config, params, state, -1, lambda leaf, axis: jnp.delete(leaf, domain, axis))


def posterior(config: Mapping, params: Tree, state: Tree, batches: Iterable[Mapping], decay: float = 0.3,
              evidence: domains.Evidence = 'previous_token') -> np.ndarray:
  """Posterior over domains of a text: a moving average of the posteriors at the end of its rows, from a uniform prior.

  This is the prior that the paper caches, computed from 100 held-out rows.

  Args:
    batches: for a language model: `tokens`, `targets`, `positions`, `loss_mask`, and `segments` if rows are packed.
    decay: weight of the newest row.
    evidence: see `domains.mixture_weights`.

  Returns:
    <float64>[J], for the J domains.

  Raises:
    ValueError: it is not a DEMix model, or there is no text.
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
    raise ValueError('config.model is not a DEMix decoder: config.model.moe.router is not papers.demix(...).')
  return moe['router']['score']['num_tasks']


def _resized(config, params, state, by, change):
  axes = models.build(config).axes
  experts, names = expert_paths(axes), flatten(axes)
  config = plain_copy(config)
  config['moe']['num_experts'] += by
  config['moe']['router']['score']['num_tasks'] += by
  changed = {path: change(leaf, names[path].index('expert')) if path in experts else leaf
             for path, leaf in flatten(params).items()}
  return config, unflatten(changed), state
