"""Which layers are sparse, and with how many experts.

A layout is named in the config: `sparse=dict(name='every', n=2)`; layers count from 0.
"""
from collections.abc import Mapping

from moejax.config import ConfigError, Registry
from moejax.ranges import Count, Natural

LAYOUTS = Registry('sparse layer layout')


def kinds(config: Mapping, where: str, num_layers: int) -> tuple[str, ...]:
  """'sparse' or 'dense' for each of `num_layers` layers.

  Raises:
    ConfigError: the layout names layers that do not exist.
  """
  sparse = set(LAYOUTS.build(config, where, num_layers=num_layers))
  outside = sorted(layer for layer in sparse if not 0 <= layer < num_layers)
  if outside:
    raise ConfigError(f'{where}: layer {outside[0]} cannot be sparse; there are {num_layers} layers, counted from 0.')
  return tuple('sparse' if layer in sparse else 'dense' for layer in range(num_layers))


def mixtures(moe: Mapping | None, where: str, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Mapping]]:
  """(kinds, `moe` of each sparse kind). Where `moe.num_experts` is a list, one for each sparse layer, first to last,
  layers with different numbers are of different kinds: 'sparse of 32', 'sparse of 64' (the pyramid of DeepSpeed-MoE,
  2201.05596, section 4.1).

  Raises:
    ConfigError: the list is not as long as there are sparse layers.
  """
  if moe is None or not isinstance(moe.get('num_experts'), (list, tuple)):
    return kinds, {} if moe is None else {'sparse': moe}
  numbers = list(moe['num_experts'])
  if len(numbers) != kinds.count('sparse') or not all(type(number) is int for number in numbers):
    raise ConfigError(f'{where}.num_experts = {numbers} must be one whole number for each of the '
                      f'{kinds.count("sparse")} sparse layers, or a single one for all of them.')
  rest = iter(numbers)
  named = tuple(f'sparse of {next(rest)}' if kind == 'sparse' else kind for kind in kinds)
  return named, {f'sparse of {number}': {**moe, 'num_experts': number} for number in numbers}


@LAYOUTS('none')
def none():
  """No layer."""
  return ()


@LAYOUTS('layers')
def layers(*, indices: tuple[Natural, ...]):
  """Those named.

  Config:
    indices: numbers of the layers, from 0.
  """
  return indices


@LAYOUTS('every')
def every(*, num_layers: int, n: Count, first: Natural | None = None):
  """The last of each n: layers n-1, 2n-1, ...: Switch and V-MoE "Every-2" with n=2, ST-MoE with n=4.

  Config:
    n: of how many layers one is sparse.
    first: the first sparse layer, if not n-1; GLaM's blocks have the mixture before the dense layer: n=2, first=0.
  """
  return range(n - 1 if first is None else first, num_layers, n)


@LAYOUTS('last')
def last(*, num_layers: int, n: Natural, where: str):
  """The last n of layers 1, 3, 5, ...: V-MoE "Last-n" (2106.05974).

  Config:
    n: how many layers.
  """
  return _at_most(n, range(1, num_layers, 2)[-n or num_layers:], where)


@LAYOUTS('top')
def top(*, num_layers: int, n: Natural, where: str):
  """The last n layers: Soft MoE; flaxformer's TOP.

  Config:
    n: how many layers.
  """
  return _at_most(n, range(num_layers)[-n or num_layers:], where)


@LAYOUTS('bottom')
def bottom(*, num_layers: int, n: Natural, where: str):
  """The first n layers: flaxformer's BOTTOM.

  Config:
    n: how many layers.
  """
  return _at_most(n, range(num_layers)[:n], where)


@LAYOUTS('middle')
def middle(*, num_layers: int, n: Natural, where: str):
  """n layers in the middle, the later half where there are two middles: flaxformer's MIDDLE.

  Config:
    n: how many layers.
  """
  first = (num_layers - n + 1) // 2
  return _at_most(n, range(num_layers)[first:first + n] if n <= num_layers else (), where)


def _at_most(n, chosen, where):
  if len(chosen) != n:
    raise ConfigError(f'{where}.n: there are not {n} such layers; lower n or add layers.')
  return chosen
