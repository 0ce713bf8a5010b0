"""Modules as pure functions over plain nested dicts; the only file that splits and merges Flax NNX modules.

Modules declare variables; this file turns them into `init(key) -> (params, state)` and
`apply(params, state, ...)`, whose trees are nested dicts with readable paths (`blocks/3/moe/experts/wi`).
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Tree = dict[str, Any]
# The attribute that holds the transformer of a model; paths leave it out: `blocks/3/moe/experts/wi`.
TRUNK = 'transformer'
# Makes a module with the parameters that its `rngs` draw: an `nnx.Rngs`, or `Keys`.
Build = Callable[[Any], nnx.Module]


class RouterState(nnx.Variable):
  """Router state kept between steps and not trained by gradient (biases, moving loads)."""


class Keys:
  """A stand-in for `nnx.Rngs(params=key)` that yields the same keys in the same order; modules take it as `rngs`.

  Its counter is a Python int: the array in `nnx.Rngs` took most of the time of building a traced model.
  """

  def __init__(self, key: jax.Array):
    self._key, self._count = key, -1

  def params(self) -> jax.Array:
    """The next key."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count)


def parameter(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
  """A float32 parameter with one logical axis name per dimension; `parallel/rules.py` maps names to mesh axes."""
  if len(shape) != len(axes):
    raise ValueError(f'{len(shape)} dimensions {shape} but {len(axes)} axis names {axes}.')
  return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def router_state(value: jax.Array, axes: tuple[str | None, ...]) -> RouterState:
  """A `RouterState` variable; changed only by the updates that the router returns."""
  return RouterState(value, axes=axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """Statistics of a batch that update one piece of router state: its new value is `rule(state, sums)`.

  Attributes:
    sums: an array of sums over tokens; they add up over the parts of a batch and over layers that share the state.
    rule: takes the sums of the whole batch, and keeps leading axes (of scanned layers). Equal configs must have equal
      rules: a frozen dataclass with `__call__`, or a module-level function.
  """
  sums: jax.Array
  rule: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class Functional:
  """A module seen as `init` and `apply`.

  Attributes:
    init: `key -> (params, state)`; pure, so that `jax.eval_shape` and `jax.jit` with output shardings work on it.
    apply: `(params, state, *args, **kwargs) -> ` the return value of the module's `__call__`.
    axes: logical axis names of every leaf of `params`.
    state_axes: the same for `state`.
    init_cache: `(batch, length) -> cache`, what the module remembers of B rows of at most `length` tokens before the
      first, for `apply(..., cache=)`; of an encoder-decoder `(batch, length, source_length)`.
    cache_axes: `() -> ` logical axis names of every leaf of the cache.
  """
  init: Callable[[jax.Array], tuple[Tree, Tree]]
  apply: Callable[..., Any]
  axes: Tree
  state_axes: Tree
  init_cache: Callable[..., Tree] = lambda batch, length: {}
  cache_axes: Callable[[], Tree] = dict

  def shapes(self) -> tuple[Tree, Tree]:
    """`(params, state)` as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(self.init, jax.random.key(0))


def functionalize(build: Build, method: Callable | None = None) -> Functional:
  """`build(rngs)` constructs the module; it is traced once here, without allocating anything.

  `method`: what `apply` calls, e.g. `MoE.mix`; the module itself by default.
  """
  abstract: Any = nnx.eval_shape(lambda: build(Keys(jax.random.key(0))))
  graph, abstract_params, abstract_state = nnx.split(abstract, nnx.Param, RouterState)

  def init(key):
    _, params, state = nnx.split(build(Keys(key)), nnx.Param, RouterState)
    return _to_dict(params), _to_dict(state)

  def apply(params, state, *args, **kwargs):
    module = nnx.merge(graph, _from_dict(abstract_params, params), _from_dict(abstract_state, state))
    return module(*args, **kwargs) if method is None else method(module, *args, **kwargs)

  def of_cache(name):
    if not hasattr(abstract, name):
      raise TypeError(f'{type(abstract).__name__} has no cache: it is applied to whole inputs. Models that decode have '
                      'one (docs/decoding.md).')
    return getattr(abstract, name)

  return Functional(init, apply, _axes(abstract_params), _axes(abstract_state),
                    lambda *sizes: of_cache('init_cache')(*sizes), lambda: of_cache('cache_axes')())


def stack_modules(build: Build, count: int, rngs: nnx.Rngs,
                  axis: str | None = None) -> nnx.Module:
  """One module whose variables are stacked from `count` independently built modules, on a new leading axis.

  Entry `i` equals `unstacked_modules(build, count, rngs)[i]` built from the same `rngs`.

  Args:
    axis: logical name of the new axis; None: 'layers', before all named axes.
  """
  keys = jax.random.split(rngs.params(), count)
  template = nnx.eval_shape(lambda: build(Keys(keys[0])))
  graph, _ = nnx.split(template)
  variables = jax.vmap(lambda key: nnx.state(build(Keys(key))))(keys)
  if axis is not None:
    variables = nnx.from_flat_state([(path, variable.replace(axes=(axis, *variable.get_metadata()['axes'])))
                                     for path, variable in nnx.to_flat_state(variables)])
  return nnx.merge(graph, variables)


def unstacked_modules(build: Build, count: int, rngs: nnx.Rngs) -> nnx.List:
  """`count` independently built modules."""
  return nnx.List([build(Keys(key)) for key in jax.random.split(rngs.params(), count)])


def scan_modules(stacked: nnx.Module, body: Callable, carry: Any, xs: Any = None, **scan_options) -> tuple[Any, Any]:
  """`jax.lax.scan` over modules stacked by `stack_modules`: `body(module, carry, x) -> (carry, y)`."""
  graph, variables = nnx.split(stacked)
  return jax.lax.scan(lambda carry, x: body(nnx.merge(graph, x[0]), carry, x[1]), carry, (variables, xs),
                      **scan_options)


def open_module(module: nnx.Module) -> tuple[dict[str, jax.Array], dict[str, tuple], Callable[[dict], nnx.Module]]:
  """A module's arrays by path, their axis names, and a function that rebuilds it from such arrays or shards of them."""
  graph, state = nnx.split(module)
  variables = {_path(path): (path, variable) for path, variable in nnx.to_flat_state(state)}

  def rebuild(arrays):
    return nnx.merge(graph, nnx.from_flat_state([(path, variable.replace(arrays[name]))
                                                 for name, (path, variable) in variables.items()]))

  return ({name: variable[...] for name, (_, variable) in variables.items()},
          {name: variable.get_metadata()['axes'] for name, (_, variable) in variables.items()}, rebuild)


def expert_paths(axes: Tree) -> set[str]:
  """Paths of the parameters that belong to routed experts: an axis of each is named 'expert'.

  Args:
    axes: logical axis names, as `Functional.axes`.
  """
  return {path for path, names in flatten(axes).items() if 'expert' in names}


def flatten(tree: Tree, prefix: str = '') -> dict[str, Any]:
  """`{'a': {'b': x}} -> {'a/b': x}`; empty dicts vanish."""
  flat = {}
  for name, value in tree.items():
    path = f'{prefix}{name}'
    flat.update(flatten(value, path + '/') if isinstance(value, dict) else {path: value})
  return flat


def unflatten(flat: dict[str, Any]) -> Tree:
  """The inverse of `flatten`."""
  tree: Tree = {}
  for path, value in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def merge_updates(state: Tree, updates: Tree) -> Tree:
  """`state` after a step. `updates`: a nested dict over some of its paths, of `Statistics` and new values."""
  flat, new = flatten(state), flatten(updates)
  unknown = sorted(set(new) - set(flat))
  if unknown:
    raise ValueError(f'updates for unknown router state {unknown}; the state has {sorted(flat)}.')
  return unflatten({**flat, **{path: value.rule(flat[path], value.sums) if isinstance(value, Statistics) else value
                               for path, value in new.items()}})


def add_updates(one: Tree, other: Tree) -> Tree:
  """Merges the updates of two parts of a batch: statistics are added, and new values are the same in both."""
  def add(a, b):
    return dataclasses.replace(a, sums=a.sums + b.sums) if isinstance(a, Statistics) else b
  return jax.tree.map(add, one, other, is_leaf=lambda node: isinstance(node, Statistics))


def _path(path) -> str:
  return '/'.join(str(part) for part in path if part != TRUNK)


def _to_dict(variables) -> Tree:
  return unflatten({_path(path): variable[...] for path, variable in nnx.to_flat_state(variables)})


def _from_dict(abstract, tree: Tree):
  flat = flatten(tree)
  expected = [_path(path) for path, _ in nnx.to_flat_state(abstract)]
  if set(flat) != set(expected):
    raise ValueError(f'the parameter tree does not fit the model: missing {sorted(set(expected) - set(flat))[:5]}, '
                     f'unexpected {sorted(set(flat) - set(expected))[:5]}.')
  leaves = [(path, variable.replace(flat[_path(path)])) for path, variable in nnx.to_flat_state(abstract)]
  return nnx.from_flat_state(leaves)


def _axes(abstract) -> Tree:
  def axes(variable):
    names = variable.get_metadata().get('axes')
    dimensions = len(variable.shape)
    names = (None,) * dimensions if names is None else tuple(names)
    return ('layers',) * (dimensions - len(names)) + names
  return unflatten({_path(path): axes(variable) for path, variable in nnx.to_flat_state(abstract)})
