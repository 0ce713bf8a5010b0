"""Gradient descent with equally large steps for all experts, however few examples an expert sees."""
import jax
import jax.numpy as jnp
import optax

from moejax.functional import Tree, expert_paths, flatten, unflatten


def expert_axes(axes: Tree) -> Tree:
  """For every parameter the dimensions that index experts (or layers of experts); () if it belongs to no expert."""
  experts = expert_paths(axes)
  return unflatten({path: tuple(i for i, name in enumerate(names) if name in ('layers', 'expert'))
                    if path in experts else () for path, names in flatten(axes).items()})


def normalized_by_expert(axes: Tree) -> optax.GradientTransformation:
  """Divides the gradient of every expert by the sum of the norms of its parameters' gradients.

  This is the update of "Towards Understanding MoE" (2208.02813, equation 3.4), with the sum of norms in its published
  code instead of the norm of all parameters together. Zero gradients stay zero; other parameters keep their gradients.

  Args:
    axes: logical axis names of the parameters; those of one module that have an axis 'expert' belong to its experts.
  """
  lines = flatten(expert_axes(axes))

  def update(updates, state, params=None):
    del params
    flat, norms = flatten(updates), {}
    def norm(path):
      others = tuple(i for i in range(flat[path].ndim) if i not in lines[path])
      return jnp.sqrt(jnp.sum(jnp.square(flat[path]), axis=others))
    module = lambda path: path.rpartition('/')[0]
    for path in flat:
      if lines[path]:
        norms[module(path)] = norms.get(module(path), 0.) + norm(path)
    def normalized(path):
      if not lines[path]:
        return flat[path]
      total = norms[module(path)]
      total = total.reshape(*[size if i in lines[path] else 1 for i, size in enumerate(flat[path].shape)])
      return flat[path] / jnp.where(total > 0, total, 1.)
    return unflatten({path: normalized(path) for path in flat}), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_others(axes: Tree, factor: float) -> optax.GradientTransformation:
  """Multiplies the updates of all parameters that belong to no expert."""
  lines = expert_axes(axes)

  def update(updates, state, params=None):
    del params
    is_line = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda line, u: u if line else factor * u, lines, updates, is_leaf=is_line), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
