"""The state of an optimizer: a pytree, whose leaves that mirror a parameter are sharded like that parameter."""
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.functional import Tree, flatten


def state_shardings(transform: optax.GradientTransformation, params: Tree, shardings: Tree, otherwise: Any) -> Any:
  """The sharding of every leaf of the optimizer's state: that of the parameter it mirrors, or `otherwise`.

  A leaf mirrors a parameter if its path ends in the parameter's and its shape is the same, or (Adafactor's factors) lacks
  one dimension of it.
  """
  flat, flat_shardings = flatten(params), flatten(shardings)

  def mirrored(name, shape):
    whole, sharding = flat[name].shape, flat_shardings[name]
    if shape == whole:
      return sharding
    spec = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
    for i in range(len(whole)):
      if shape == whole[:i] + whole[i + 1:]:
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:i], *spec[i + 1:]))
    return None

  def sharding(path, leaf):
    # dict keys have `.key`; the containers of optax above them are attributes and positions
    names = [str(part.key) if isinstance(part, jax.tree_util.DictKey) else None for part in path]
    for start in range(len(names)):
      name = '/'.join(name or '' for name in names[start:]) if None not in names[start:] else None
      if name in flat and (found := mirrored(name, leaf.shape)):
        return found
    return otherwise

  return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(transform.init, params))


def at_step(opt_state: Any, step: jax.Array) -> Any:
  """`opt_state` with its schedule set to `step`: the learning rate depends on the step, not on what was skipped before.

  All other counters count updates, as the bias correction of moments requires.
  """
  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)
  return jax.tree.map(lambda node: node._replace(count=step) if is_schedule(node) else node, opt_state,
                      is_leaf=is_schedule)
