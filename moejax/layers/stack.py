"""A stack of blocks of several kinds, scanned or unrolled; both compute the same function of the same key.

A pattern of kinds is factored into segments, each a repeated unit: 'every second of 12 layers is sparse' is
(dense, sparse) x 6, and 'the last two odd ones' is dense x 8, then (dense, sparse) x 2. If scanned, a segment is one
`jax.lax.scan` over its repeats, and only its unit is compiled.
"""
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.functional import Tree
from moejax.layers.sublayer import Left
from moejax.ranges import Between
from moejax.routing.router import RouterOutput

Stacking = Literal['scan', 'unrolled']
Depth = Annotated[int, Between(1, 1000)]
# The residuals of each block saved for the backward pass; all others are recomputed.
Remat = Literal['none', 'full', 'dots', 'dots_with_no_batch_dims']
_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_saveable,
    'dots_with_no_batch_dims': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# `(block, x, key, depth, cache) -> (x, what each of its branches leaves)`; `depth` may be traced, `cache` be None.
Step = Callable[[nnx.Module, jax.Array, jax.Array | None, Any, Any], tuple[jax.Array, dict[str, Left]]]


@functools.lru_cache
def factor(kinds: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], int], ...]:
  """Segments `(unit, repeats)` that make up `kinds`, with as few blocks in units as possible, then as few segments.

  >>> factor(('dense', 'dense', 'dense', 'sparse', 'dense', 'sparse'))
  ((('dense',), 2), (('dense', 'sparse'), 2))
  """
  best = [(0, 0, ())]  # for each prefix: blocks in units, segments, the segments
  for end in range(1, len(kinds) + 1):
    candidates = []
    for start in range(end):
      length = end - start
      period = next(p for p in range(1, length + 1) if length % p == 0 and
                    kinds[start:end] == kinds[start:start + p] * (length // p))
      blocks, segments, spelled = best[start]
      candidates.append((blocks + period, segments + 1, spelled + ((kinds[start:start + period], length // period),)))
    best.append(min(candidates, key=lambda candidate: candidate[:2]))
  return best[-1][2]


def places(segments: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
  """(depth, segment, repeat, position in the unit) of every layer, by depth.

  Args:
    segments: (blocks in the unit, repeats) of each.
  """
  depth = 0
  for segment, (unit, repeats) in enumerate(segments):
    for repeat in range(repeats):
      for position in range(unit):
        yield depth, segment, repeat, position
        depth += 1


@dataclasses.dataclass(frozen=True)
class Stack:
  """Builds and runs a list of blocks. Holds no variables: those are in the list that `build` returns.

  Parameter paths below the attribute that holds the blocks are `<depth>/...` if unrolled, and
  `<segment>/<position in the unit>/...`, with a leading axis of repeats, if scanned.
  """
  kinds: tuple[str, ...]
  stacking: Stacking = 'scan'
  remat: Remat = 'none'

  @property
  def traced_kinds(self) -> tuple[str, ...]:
    """Kinds of the blocks traced and compiled, those of `distinct`: if scanned, of the units; if unrolled, of all."""
    return tuple(kind for unit, _ in factor(self.kinds) for kind in unit) if self.stacking == 'scan' else self.kinds

  @property
  def traced(self) -> int:
    """Number of blocks traced and compiled."""
    return len(self.traced_kinds)

  def build(self, block: Callable[..., nnx.Module], rngs: nnx.Rngs) -> nnx.List:
    """Calls `block(kind, rngs=)` for every layer."""
    make = functional.stack_modules if self.stacking == 'scan' else functional.unstacked_modules
    segments = []
    for unit, repeats in factor(self.kinds):
      build_unit = lambda rngs, unit=unit: nnx.List([block(kind, rngs=rngs) for kind in unit])
      segments.append(make(build_unit, repeats, rngs))
    if self.stacking == 'scan':
      return nnx.List(segments)
    return nnx.List([block for segment in segments for unit in segment for block in unit])

  def distinct(self, blocks: nnx.List) -> Iterator[nnx.Module]:
    """Blocks for reading their static attributes; if scanned, one for all repeats."""
    for block in blocks:
      if self.stacking == 'scan':
        yield from block
      else:
        yield block

  def run(self, blocks: nnx.List, step: Step, x: Float[Array, '... D'], key: jax.Array | None,
          cache: Tree | None = None,
          views: nnx.List | None = None) -> tuple[Float[Array, '... D'], dict[str, RouterOutput], Tree, Tree | None]:
    """Applies all blocks to `x`.

    Args:
      blocks: as `build` returns them.
      step: applies one.
      x: <float>[B,S,D].
      key: for noise and dropout.
      cache: what the branches of each block remember, by the paths of `blocks`, as `caches` returns it.
      views: a `View` for each block, as `build` returns them: `step` receives the block with the weights that it makes.

    Returns:
      x: output of the last block.
      routers: `{'block_03': RouterOutput}` for each router, in order; the same names and shapes whether scanned or not.
      updates: updates of router state, nested by the paths of `blocks`.
      cache: the new one, where a branch that left none keeps what it had; None without one.
    """
    step = self._opened(step)
    depths = jnp.arange(len(self.kinds))
    keys = None if key is None else jax.vmap(lambda depth: jax.random.fold_in(key, depth))(depths)
    run = self._scan if self.stacking == 'scan' else self._unroll
    views = nnx.List([None] * len(blocks)) if views is None else views
    x, left, updates, new_cache = run(blocks, views, step, x, keys, depths, cache or {})
    routers = {}
    for depth in sorted(left):
      routers |= routers_of(f'block_{depth:02d}', left[depth])
    if cache is not None:
      cache = functional.unflatten({**functional.flatten(cache), **functional.flatten(new_cache)})
    return x, routers, updates, cache

  def caches(self, of_kind: Callable[[str], Tree]) -> Tree:
    """`of_kind(kind)` for every layer, by the paths of blocks; scanned ones have an axis of repeats before all others."""
    return self._by_path(of_kind, lambda array, repeats: jnp.broadcast_to(array, (repeats, *array.shape)))

  def cache_axes(self, of_kind: Callable[[str], Tree]) -> Tree:
    """Logical names of the axes of `caches`; `of_kind(kind)` are those of a layer."""
    return self._by_path(of_kind, lambda axes, _: ('layers', *axes))

  def _by_path(self, of_kind: Callable[[str], Tree], repeated: Callable[[Any, int], Any]) -> Tree:
    # `of_kind(kind)` by the paths of blocks, with `repeated(leaf, repeats)` where these are scanned.
    if self.stacking != 'scan':
      return {str(depth): tree for depth, kind in enumerate(self.kinds) if (tree := of_kind(kind))}
    stacked = lambda tree, repeats: functional.unflatten(
        {path: repeated(leaf, repeats) for path, leaf in functional.flatten(tree).items()})
    return {str(segment): {str(position): stacked(tree, repeats)
                           for position, kind in enumerate(unit) if (tree := of_kind(kind))}
            for segment, (unit, repeats) in enumerate(factor(self.kinds))}

  def unrolled(self, scanned: Tree) -> Tree:
    """Converts parameters (or any tree with the same paths) from the scanned to the unrolled form."""
    tree = {}
    for depth, segment, repeat, position in self._places():
      if str(position) in scanned.get(str(segment), {}):
        tree[str(depth)] = jax.tree.map(lambda leaf: leaf[repeat], scanned[str(segment)][str(position)])
    return tree

  def scanned(self, unrolled: Tree) -> Tree:
    """The inverse of `unrolled`."""
    tree: Tree = {}
    for depth, segment, _, position in self._places():
      if str(depth) in unrolled:
        tree.setdefault(str(segment), {}).setdefault(str(position), []).append(unrolled[str(depth)])
    return {segment: {position: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
                      for position, trees in unit.items()} for segment, unit in tree.items()}

  def _places(self) -> Iterator[tuple[int, int, int, int]]:
    return places((len(unit), repeats) for unit, repeats in factor(self.kinds))

  def _unroll(self, blocks, views, step, x, keys, depths, cache):
    left, updates, new_cache = {}, {}, {}
    for depth, (block, view) in enumerate(zip(blocks, views)):
      name = str(depth)
      key = None if keys is None else keys[depth]
      x, left[depth] = step(block, view, x, key, depths[depth], cache.get(name))
      if changed := updates_of(left[depth]):
        updates[name] = changed
      if remembered := caches_of(left[depth]):
        new_cache[name] = remembered
    return x, left, updates, new_cache

  def _scan(self, blocks, views, step, x, keys, depths, cache):
    def body(modules, x, per_layer):
      unit, unit_views = modules
      keys, depths, caches = per_layer
      left = []
      for position, block in enumerate(unit):
        key = None if keys is None else keys[position]
        view = None if unit_views is None else unit_views[position]
        x, of_block = step(block, view, x, key, depths[position], caches.get(str(position)))
        left.append(of_block)
      return x, left

    stacked, updates, new_cache, first = [], {}, {}, 0
    for segment, ((unit, repeats), *modules) in enumerate(zip(factor(self.kinds), blocks, views)):
      name = str(segment)
      take = lambda a: a[first:first + repeats * len(unit)].reshape(repeats, len(unit))
      per_layer = (*jax.tree.map(take, (keys, depths)), cache.get(name, {}))
      x, left = functional.scan_modules(nnx.List(modules), body, x, per_layer)
      stacked.append(left)
      if changed := {str(position): new for position, one in enumerate(left) if (new := updates_of(one))}:
        updates[name] = changed
      if remembered := {str(position): new for position, one in enumerate(left) if (new := caches_of(one))}:
        new_cache[name] = remembered
      first += repeats * len(unit)
    left = {depth: jax.tree.map(lambda a: a[repeat], stacked[segment][position])
            for depth, segment, repeat, position in self._places()}
    return x, left, updates, new_cache

  def _opened(self, step: Step) -> Callable:
    """`step` of a block and its view: with the weights that the view makes, and as much recomputed as `remat` says."""
    def opened(block, view, *inputs):
      if view is not None:
        stored, _, rebuild = functional.open_module(block)
        block = rebuild(view(stored))
      return step(block, *inputs)

    def rematerialised(block, view, *inputs):
      variables, _, rebuild = functional.open_module(nnx.List([block, view]))
      # Inside a scan the loop already prevents the compiler from merging the two computations.
      both = lambda variables: typing.cast(nnx.List, rebuild(variables))
      compute = jax.checkpoint(lambda variables, *inputs: opened(*both(variables), *inputs),
                               policy=_POLICIES[self.remat], prevent_cse=self.stacking != 'scan')
      return compute(variables, *inputs)
    return opened if self.remat == 'none' else rematerialised


def updates_of(left: dict[str, Left]) -> dict[str, Any]:
  """Updates of the state of all routers of a block, by the paths of its variables."""
  return {branch: dict(router=one.router.updates)
          for branch, one in left.items() if one.router is not None and one.router.updates}


def routers_of(name: str, left: dict[str, Left]) -> dict[str, RouterOutput]:
  """The outputs of the routers of the block `name`, without updates: `{'block_03': ...}` for a single one,
  `{'block_03/attention': ..., 'block_03/moe': ...}` for several."""
  found = {branch: dataclasses.replace(one.router, updates={})
           for branch, one in left.items() if one.router is not None}
  return {name if len(found) == 1 else f'{name}/{branch}': output for branch, output in found.items()}


def caches_of(left: dict[str, Left]) -> dict[str, Any]:
  """What the branches of a block remember."""
  return {branch: one.cache for branch, one in left.items() if one.cache is not None}
