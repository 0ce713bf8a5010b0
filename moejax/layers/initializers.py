"""Weight initialisers, named in the config of the layer that owns the weight."""
from collections.abc import Mapping

import jax

from moejax.config import Registry
from moejax.ranges import NonNegative, Positive

Initializer = jax.nn.initializers.Initializer
INITIALIZERS: Registry[Initializer] = Registry('initializer', Initializer, context=('in_axis', 'out_axis'))
Axes = int | tuple[int, ...]


def build(config: Mapping, where: str, *, in_axis: Axes = -2, out_axis: Axes = -1) -> Initializer:
  """`init(key, shape, dtype)`; `in_axis` and `out_axis`: input and output dimensions of the weight."""
  return INITIALIZERS.build(config, where, in_axis=in_axis, out_axis=out_axis)


@INITIALIZERS('fan_in')
def fan_in(*, in_axis, out_axis, scale: Positive = 1.) -> Initializer:
  """Truncated normal with variance `scale / fan_in`; Switch Transformer (2101.03961, section 2.4) trains with 0.1.

  Config:
    scale: scale of the variance.
  """
  return jax.nn.initializers.variance_scaling(scale, 'fan_in', 'truncated_normal', in_axis, out_axis)


@INITIALIZERS('xavier_uniform')
def xavier_uniform(*, in_axis, out_axis) -> Initializer:
  """Uniform with variance `2 / (fan_in + fan_out)`, as in vision transformers."""
  return jax.nn.initializers.xavier_uniform(in_axis, out_axis)


@INITIALIZERS('normal')
def normal(*, std: NonNegative) -> Initializer:
  """Normal with a standard deviation independent of the shape.

  Config:
    std: the standard deviation.
  """
  return jax.nn.initializers.normal(std)
