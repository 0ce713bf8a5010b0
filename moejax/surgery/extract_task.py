"""Extracts a task's dense model from a sparse one that routes by task (arXiv 2110.03742, section 3.3)."""
import copy
import inspect
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moejax import models
from moejax.experts.feed_forward import FeedForwardExperts
from moejax.functional import Tree, expert_paths, flatten, unflatten

# Axis of the hidden units of each parameter, along which experts are concatenated to one wider feed-forward.
_HIDDEN_AXIS = {'wi': 1, 'wg': 1, 'wo': 0, 'bi': 0, 'bg': 0}


def extract_task(config: Mapping, params: Tree, state: Tree, task: int,
                 side: str | None = None) -> tuple[dict, Tree, Tree]:
  """Concatenates the experts of `task` to one feed-forward per layer, with combine weights folded into `wo` and `bo`.

  A shared expert is one of them, with weight 1.

  If experts are whole layers (`sparse_form='layer'`), takes the layers on the task's route.

  The output equals the full model's for that task: the same sum, written as one product.

  Args:
    config: `config.model`, with `stacking='unrolled'` and experts that are 'feed_forward' or layers.
    params, state: of that model.
    task: the task's number in `tasks`.
    side: 'encoder' or 'decoder' of an encoder-decoder, whose other side is unchanged; None: a decoder-only model.

  Returns:
    `(config, params, state)` of the dense model.

  Raises:
    ValueError: the routes depend on more than the task, the layers would differ in width or activation, the shared
      expert cannot be joined with the others, or the route mixes several experts that are layers, whose sum is not a
      layer.
  """
  config = plain_copy(config)
  part = config if side is None else config[side]
  where, prefix = ('config.model', '') if side is None else (f'config.model.{side}', f'{side}/')
  sparse_form = part.get('sparse_form', 'replace')
  whole = sparse_form == 'layer'
  replaces = sparse_form == 'replace' and part['moe']['experts']['name'] == 'feed_forward'
  if part.get('stacking', 'unrolled') != 'unrolled' or not (whole or replaces):
    raise ValueError(f"{where}: extraction requires stacking='unrolled', and experts that are layers, or 'feed_forward' in "
                     'the place of the dense one.')
  if not whole:
    check_shared(part['moe'], f'{where}.moe')
  weights = routes(config, params, state, task, '' if side is None else f'{side}_')
  flat, of_experts = flatten(params), expert_paths(models.build(config).axes)
  new = {path: leaf for path, leaf in flat.items()
         if f'{prefix}blocks/' not in path or '/moe/' not in path or not path.startswith(prefix)}
  for depth, weight in weights.items():
    here = f'{prefix}blocks/{depth}/'
    experts = {path: flat[path] for path in of_experts if path.startswith(here)}
    if whole:
      new |= {here + path.removeprefix(f'{here}moe/layers/'): leaf[on_route(weight, where)]
              for path, leaf in experts.items()}
      continue
    parts = [({path.rpartition('/')[2]: leaf[e] for path, leaf in experts.items()}, weight[e])
             for e in np.flatnonzero(weight)]
    if shared := {path.removeprefix(f'{here}moe/shared/'): leaf for path, leaf in flat.items()
                  if path.startswith(f'{here}moe/shared/')}:
      parts.append((shared, 1))
    new |= {f'{here}feed_forward/{name}': leaf for name, leaf in side_by_side(parts).items()}

  moe = part.pop('moe')
  part.pop('sparse')
  part.pop('sparse_form', None)
  if not whole:
    widths = {leaf.shape[1] for path, leaf in new.items()
              if path.startswith(prefix) and path.endswith('/feed_forward/wi')}
    if len(widths) > 1:
      raise ValueError(f'{where}: the feed-forwards would have widths {sorted(widths)}, but a dense model has one. '
                       "Train with dense layers as wide as a task's experts together.")
    if len(weights) < part['num_layers'] and form(part['feed_forward']) != form(moe['experts']):
      raise ValueError(f'{where}: experts are {form(moe["experts"])}, dense layers {form(part["feed_forward"])}, but a '
                       'dense model has one kind of feed-forward. Train with experts of the same.')
    part['feed_forward'] = {**part['feed_forward'], **form(moe['experts']), 'hidden': widths.pop()}
  gone = {path for path in flatten(state) if path.startswith(f'{prefix}blocks/')}
  state = unflatten({path: leaf for path, leaf in flatten(state).items() if path not in gone})
  return config, unflatten(new), state


def plain_copy(config: Mapping) -> dict:
  """A deep copy as plain dicts."""
  return copy.deepcopy(config.to_dict() if isinstance(config, ConfigDict) else dict(config))


def routes(config: Mapping, params: Tree, state: Tree, task: int, prefix: str = '') -> dict[int, np.ndarray]:
  """`{depth: <float32>[E]}`: the combine weights of the task's tokens in every sparse layer.

  Args:
    prefix: prefix of the routers' names: '', 'encoder_' or 'decoder_'.

  Raises:
    ValueError: tokens of the task have different weights, or none.
  """
  ids = jnp.arange(16, dtype=jnp.int32).reshape(2, 8) % config['vocab_size']
  names = ('',) if config['name'] == 'decoder' else ('encoder_', 'decoder_')
  batch = {f'{name}{field}': value for name in names
           for field, value in (('tokens', ids), ('tasks', jnp.full_like(ids, task)))}
  routers = jax.jit(models.build(config).apply)(params, state, batch).routers
  found = {}
  for name, router in routers.items():
    if not name.startswith(f'{prefix}block_'):
      continue
    plan = router.plan
    weight = np.asarray(plan.to_dense().weight if hasattr(plan, 'to_dense') else plan.shares())
    weight = weight.reshape(-1, weight.shape[-1])
    if (weight != weight[0]).any() or not weight.any():
      raise ValueError(f'{name}: tokens of task {task} do not all have the same experts. Use a model that routes by '
                       'task only, without a capacity.')
    found[int(name.rpartition('_')[2])] = weight[0]
  return found


def on_route(weight: np.ndarray, where: str) -> int:
  """The expert that has all of the weight <float32>[E]. Raises ValueError if there is none."""
  if np.count_nonzero(weight) != 1 or weight.max() != 1:
    raise ValueError(f'{where}: the task mixes whole layers with the weights {np.round(weight, 3)}; the mixture is not '
                     'a layer. Train with a router that picks one, e.g. with relaxation="straight_through".')
  return int(weight.argmax())


def form(expert: Mapping) -> dict:
  """What feed-forwards must have in common to be joined; the defaults where `expert`, its config, omits it."""
  keys = inspect.signature(FeedForwardExperts.__init__).parameters
  return {key: expert.get(key, keys[key].default) for key in ('activation', 'use_bias')}


def check_shared(moe: Mapping, where: str) -> None:
  """Raises ValueError unless the shared expert of `moe`, if it has one, can be joined with the others."""
  shared = moe.get('shared')
  if shared is None:
    return
  if moe.get('shared_gate', 'sum') != 'sum':
    raise ValueError(f"{where}.shared_gate = {moe['shared_gate']!r} weighs the shared expert token by token, but one "
                     "feed-forward has fixed weights. Extraction requires 'sum'.")
  if shared['name'] != 'feed_forward' or form(shared) != form(moe['experts']):
    raise ValueError(f'{where}.shared: {shared["name"]!r} of {form(shared)} cannot be joined with experts that are '
                     f"'feed_forward' of {form(moe['experts'])}. Train with a shared expert of the same.")


def side_by_side(parts: Sequence[tuple[Mapping[str, jax.Array], float]]) -> dict[str, jax.Array]:
  """One feed-forward whose output is the weighted sum of those of `parts`.

  Args:
    parts: parameters of each, as of `experts.feed_forward` without an axis of experts, and its weight.
  """
  joined = {}
  for name in parts[0][0]:
    leaves = [part[name] * (weight if name in ('wo', 'bo') else 1) for part, weight in parts]
    joined[name] = sum(leaves) if name == 'bo' else jnp.concatenate(leaves, axis=_HIDDEN_AXIS[name])
  return joined
