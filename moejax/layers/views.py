"""Views of weights: what a block computes with, made from what is stored, where the stack opens the block.

    view=dict(name='lora', rank=8, of='attention/(query|value)')

A view has parameters of its own, by the paths `views/<depth>/...` like those of blocks. No layer knows of it.
"""
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import ConfigError, Registry
from moejax.functional import Tree, flatten, unflatten
from moejax.layers import initializers
from moejax.ranges import Count, Positive

Arrays = dict[str, jax.Array]
# Axes of parameters that hold several matrices; the others are inputs or outputs of one.
_SEVERAL = ('layers', 'expert', 'segment')


class View(nnx.Module):
  """Base class of views; one is built for each block."""

  def __call__(self, stored: Arrays) -> Arrays:
    """The variables of the block, by path, as stored -> as used: the same paths and shapes."""
    raise NotImplementedError


VIEWS: Registry[View] = Registry('view of weights', View, context=('block', 'rngs'))


class Adapter(nnx.Module):
  """A product of two matrices of low rank, in the shape of a parameter.

  Parameters: `a` [..., in, r] and `b` [..., r, out], where in and out are the products of the parameter's input and
  output dimensions, and `...` its experts.
  """

  def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], rank: int, rngs: nnx.Rngs):
    several, inputs = _split(axes)
    lead, lead_axes = shape[:several], axes[:several]
    whole = lambda names: names[0] if names else None
    fan_in = initializers.fan_in(in_axis=-2, out_axis=-1)
    self.a = functional.parameter(rngs, fan_in, (*lead, math.prod(shape[several:inputs]), rank),
                                  (*lead_axes, whole(axes[several:inputs]), None))
    self.b = functional.parameter(rngs, nnx.initializers.zeros, (*lead, rank, math.prod(shape[inputs:])),
                                  (*lead_axes, None, whole(axes[inputs:])))


@VIEWS('lora')
class LoRA(View):
  """`W + alpha / r * A B` in place of W (2106.09685); B starts at zero, so that the model starts unchanged.

  Config:
    rank: r.
    alpha: scales the product; r by default.
    of: regular expression on the paths of a block's parameters, e.g. 'attention/(query|value)', 'moe/experts/wi'.
  """

  def __init__(self, *, block: nnx.Module, rngs: nnx.Rngs, rank: Count, of: str, alpha: Positive | None = None):
    self.scale = (alpha or rank) / rank
    variables, axes, _ = functional.open_module(block)
    found = [path for path, variable in variables.items() if re.fullmatch(of, path)]
    for path in found:
      several, inputs = _split(axes[path])
      if not several < inputs < len(axes[path]):
        raise ConfigError(f'.of = {of!r} matches {path}, which is not a matrix: its axes are {axes[path]}.')
      setattr(self, path, Adapter(variables[path].shape, axes[path], rank, rngs))
    self.paths = tuple(found)

  def __call__(self, stored: Arrays) -> Arrays:
    adapted = {path: _adapted(stored[path], getattr(self, path).a[...], getattr(self, path).b[...], self.scale)
               for path in self.paths}
    return {**stored, **adapted}


def merge_lora(params: Tree, alpha_over_rank: float) -> Tree:
  """Parameters of the same model without the view `lora`, in which its products are added to the weights."""
  flat = flatten(params)
  views = re.compile(r'(?P<stack>.*/|)views/(?P<path>.*)/(?P<part>a|b)')
  merged = {path: leaf for path, leaf in flat.items() if not views.fullmatch(path)}
  for path in flat:
    if (match := views.fullmatch(path)) and match['part'] == 'a':
      weight = f'{match["stack"]}blocks/{match["path"]}'
      merged[weight] = _adapted(merged[weight], flat[path], flat[path[:-1] + 'b'], alpha_over_rank)
  return unflatten(merged)


def _split(axes: tuple[str | None, ...]) -> tuple[int, int]:
  # (where inputs begin, where outputs begin): the output of a projection back to the model's width is its last axis,
  # and the input of all others their first.
  several = next((i for i, name in enumerate(axes) if name not in _SEVERAL), len(axes))
  back = len(axes) > 1 and axes[-1] in ('embed', 'expert_embed')
  return several, len(axes) - 1 if back else several + 1


def _adapted(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  product = jnp.einsum('...ir,...ro->...io', a, b, precision=jax.lax.Precision.HIGHEST)
  return weight + (scale * product).reshape(weight.shape)
