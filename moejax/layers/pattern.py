"""The kind of each layer: patterns of kinds of blocks, and the shorthand of dense and sparse layers.

    blocks=dict(local=dict(mixer=dict(name='attention', window=128), ffn=...), full=...),
    pattern=dict(name='cycle', kinds=('local', 'full'))

names the kinds, each with its branches in order, and the kind of every layer. Models whose layers are all attention and
a feed-forward, dense or a mixture of experts, need not write that out: `attention`, `feed_forward`, `moe` and the
layout `sparse=dict(name='every', n=2)` stand for two kinds, 'dense' and 'sparse'. Layers are numbered from 0.
"""
import itertools
from collections.abc import Iterable, Mapping, Sequence

from moejax.config import ConfigError, Registry, config_path
from moejax.layers.block import BranchSpec
from moejax.ranges import Count, Natural

PATTERNS: Registry[tuple[str, ...]] = Registry('pattern of layers', tuple[str, ...], context=('num_layers',))
LAYOUTS: Registry[Iterable[int]] = Registry('sparse layer layout', object, context=('num_layers',))

# The branches of a kind of block, by name, in order.
Kind = dict[str, BranchSpec]


@PATTERNS('cycle')
def cycle(*, num_layers: int, kinds: tuple[str, ...]) -> tuple[str, ...]:
  """The kinds in order, again and again.

  Config:
    kinds: names of `blocks`.
  """
  return tuple(itertools.islice(itertools.cycle(kinds), num_layers)) if kinds else ()


@PATTERNS('runs')
def runs(*, runs: Sequence) -> tuple[str, ...]:
  """Some layers of one kind, then some of the next.

  Config:
    runs: kinds of `blocks`, each with its number of layers: (('dense', 1), ('sparse', 26)).
  """
  return tuple(kind for kind, count in runs for _ in range(count))


def named_kinds(blocks: Mapping, pattern: Mapping | None,
                num_layers: int) -> tuple[tuple[str, ...], dict[str, Kind]]:
  """The kind of each layer, and what each is made of, from `blocks` and `pattern`.

  Raises:
    ConfigError: the pattern does not name a kind of `blocks` for each layer.
  """
  kinds = {name: {branch: BranchSpec(config, f'{config_path()}.blocks.{name}.{branch}') for branch, config in block.items()}
           for name, block in blocks.items()}
  if pattern is None and len(kinds) > 1:
    raise ConfigError(f'.pattern is missing: {config_path()}.blocks has the kinds {", ".join(kinds)}. Set e.g. '
                      f"pattern=dict(name='cycle', kinds={tuple(kinds)}).")
  chosen = (tuple(kinds) * num_layers if pattern is None else
            PATTERNS.build(pattern, '.pattern', num_layers=num_layers))
  if unknown := sorted(set(chosen) - set(kinds)):
    raise ConfigError(f'.pattern: there is no kind {unknown[0]!r} in {config_path()}.blocks. '
                      f'Allowed: {", ".join(kinds)}.')
  if len(chosen) != num_layers:
    raise ConfigError(f'.pattern names {len(chosen)} layers, and {config_path()}.num_layers is {num_layers}.')
  if unused := sorted(set(kinds) - set(chosen)):
    raise ConfigError(f'.blocks.{unused[0]} is not used: no layer of {config_path()}.pattern is of this kind. Remove it.')
  return chosen, kinds


def dense_or_sparse(config: Mapping, num_layers: int) -> tuple[str, ...]:
  """'sparse' or 'dense' for each of `num_layers` layers.

  Raises:
    ConfigError: the layout has layers that do not exist.
  """
  sparse = set(LAYOUTS.build(config, '.sparse', num_layers=num_layers))
  outside = sorted(layer for layer in sparse if not 0 <= layer < num_layers)
  if outside:
    raise ConfigError(f'.sparse: there is no layer {outside[0]} to make sparse; the {num_layers} layers are numbered '
                      'from 0.')
  return tuple('sparse' if layer in sparse else 'dense' for layer in range(num_layers))


def mixtures(moe: Mapping | None, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Mapping]]:
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
    raise ConfigError(f'.moe.num_experts = {numbers} must have one int for each of the {kinds.count("sparse")} '
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
def last(*, num_layers: int, n: Natural):
  """The last n of layers 1, 3, 5, ...: V-MoE "Last-n" (2106.05974).

  Config:
    n: number of sparse layers.
  """
  return _at_most(n, range(1, num_layers, 2)[-n or num_layers:])


@LAYOUTS('top')
def top(*, num_layers: int, n: Natural):
  """The last n layers: Soft MoE; flaxformer's TOP.

  Config:
    n: number of sparse layers.
  """
  return _at_most(n, range(num_layers)[-n or num_layers:])


@LAYOUTS('bottom')
def bottom(*, num_layers: int, n: Natural):
  """The first n layers: flaxformer's BOTTOM.

  Config:
    n: number of sparse layers.
  """
  return _at_most(n, range(num_layers)[:n])


@LAYOUTS('middle')
def middle(*, num_layers: int, n: Natural):
  """n layers in the middle, shifted towards the end if they cannot be centred: flaxformer's MIDDLE.

  Config:
    n: number of sparse layers.
  """
  first = (num_layers - n + 1) // 2
  return _at_most(n, range(num_layers)[first:first + n] if n <= num_layers else ())


def _at_most(n, chosen):
  if len(chosen) != n:
    raise ConfigError(f'.n = {n}, but there are fewer such layers: lower n or add layers.')
  return chosen
