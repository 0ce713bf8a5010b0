"""The pattern of sparse layers, and their numbers of experts.

The config names a layout: `sparse=dict(name='every', n=2)`; layers are numbered from 0.
"""
from collections.abc import Iterable, Mapping

from moejax.config import ConfigError, Registry
from moejax.ranges import Count, Natural

LAYOUTS: Registry[Iterable[int]] = Registry('sparse layer layout', object, context=('num_layers',))


def kinds(config: Mapping, where: str, num_layers: int) -> tuple[str, ...]:
  """'sparse' or 'dense' for each of `num_layers` layers.

  Raises:
    ConfigError: the layout has layers that do not exist.
  """
  sparse = set(LAYOUTS.build(config, where, num_layers=num_layers))
  outside = sorted(layer for layer in sparse if not 0 <= layer < num_layers)
  if outside:
    raise ConfigError(f'{where}: there is no layer {outside[0]} to make sparse; the {num_layers} layers are numbered '
                      'from 0.')
  return tuple('sparse' if layer in sparse else 'dense' for layer in range(num_layers))


def mixtures(moe: Mapping | None, where: str, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Mapping]]:
  """(kinds, `moe` of each sparse kind). `moe.num_experts` may be a list with an int for each sparse layer, in order.

  Layers with different numbers are then different kinds: 'sparse of 32', 'sparse of 64' (the pyramid of DeepSpeed-MoE,
  2201.05596, section 4.1).

  Raises:
    ConfigError: the list does not have one int for each sparse layer.
  """
  if moe is None or not isinstance(moe.get('num_experts'), (list, tuple)):
    return kinds, {} if moe is None else {'sparse': moe}
  numbers = list(moe['num_experts'])
  if len(numbers) != kinds.count('sparse') or not all(type(number) is int for number in numbers):
    raise ConfigError(f'{where}.num_experts = {numbers} must have one int for each of the {kinds.count("sparse")} '
                      'sparse layers, or be a single int.')
  rest = iter(numbers)
  named = tuple(f'sparse of {next(rest)}' if kind == 'sparse' else kind for kind in kinds)
  return named, {f'sparse of {number}': {**moe, 'num_experts': number} for number in numbers}


@LAYOUTS('none')
def none():
  """No sparse layers."""
  return ()


@LAYOUTS('layers')
def layers(*, indices: tuple[Natural, ...]):
  """The given layers.

  Config:
    indices: indices of the layers, from 0.
  """
  return indices


@LAYOUTS('every')
def every(*, num_layers: int, n: Count, first: Natural | None = None):
  """Every n-th layer: n-1, 2n-1, ...; n=2 is Switch and V-MoE "Every-2", n=4 ST-MoE.

  Config:
    n: one in n layers is sparse.
    first: the first sparse layer, n-1 by default; GLaM has the mixture before the dense layer: n=2, first=0.
  """
  return range(n - 1 if first is None else first, num_layers, n)


@LAYOUTS('last')
def last(*, num_layers: int, n: Natural, where: str):
  """The last n of layers 1, 3, 5, ...: V-MoE "Last-n" (2106.05974).

  Config:
    n: number of sparse layers.
  """
  return _at_most(n, range(1, num_layers, 2)[-n or num_layers:], where)


@LAYOUTS('top')
def top(*, num_layers: int, n: Natural, where: str):
  """The last n layers: Soft MoE; flaxformer's TOP.

  Config:
    n: number of sparse layers.
  """
  return _at_most(n, range(num_layers)[-n or num_layers:], where)


@LAYOUTS('bottom')
def bottom(*, num_layers: int, n: Natural, where: str):
  """The first n layers: flaxformer's BOTTOM.

  Config:
    n: number of sparse layers.
  """
  return _at_most(n, range(num_layers)[:n], where)


@LAYOUTS('middle')
def middle(*, num_layers: int, n: Natural, where: str):
  """n layers in the middle, shifted towards the end if they cannot be centred: flaxformer's MIDDLE.

  Config:
    n: number of sparse layers.
  """
  first = (num_layers - n + 1) // 2
  return _at_most(n, range(num_layers)[first:first + n] if n <= num_layers else (), where)


def _at_most(n, chosen, where):
  if len(chosen) != n:
    raise ConfigError(f'{where}.n = {n}, but there are fewer such layers: lower n or add layers.')
  return chosen
