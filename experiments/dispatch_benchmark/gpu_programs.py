"""The JAX programs of the GPU benchmark: moejax's kernels and layer, other libraries' kernels, dense floors.

Names are 'whose what', e.g. 'dense dW', or 'whose@tiles what'. A process:

    python -m experiments.dispatch_benchmark.gpu_programs PEER JOB ANSWER
"""
import functools
import importlib.metadata
import importlib.util
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dispatch_benchmark import gpu_timing
from moejax import kernels
from moejax.kernels import fp8, hopper, hopper_fp8, padding
from moejax.kernels.expert_block import GATES, activate

# For `ragged_dot_mgpu`: block_m, block_n, block_k, steps in flight, width of the grid's panels. The fastest counts.
MGPU_TILES = (128, 128, 64, 4, 8), (128, 192, 64, 4, 4), (64, 128, 64, 6, 8), (192, 128, 64, 4, 8)


def group_sizes(load: str, rows: int, groups: int) -> np.ndarray:
  """Rows of each group, <int32>[E]: 'multinomial' with equal probabilities, or 'zipf' with probabilities ~ 1/rank."""
  share = 1 / np.arange(1, groups + 1)**(load == 'zipf')
  random = np.random.RandomState(0)
  return random.permutation(random.multinomial(rows, share / share.sum())).astype(np.int32)


def programs(peer: str, shape: dict, load: str) -> dict:
  """The programs of a peer: {name: (function, arguments)}; results are for one call.

  Args:
    peer: 'moejax', 'jax' or 'tokamax'.
    shape: rows M, experts E, dim D, hidden F, choices K, activation; with growth=True, only the programs for growth.
    load: see `group_sizes`.
  """
  rows, groups, dim, hidden = (shape[name] for name in ('rows', 'experts', 'dim', 'hidden'))
  normal = lambda n, *size: jax.random.normal(jax.random.key(n), size, jnp.bfloat16)
  x, dy, sizes = normal(0, rows, dim), normal(1, rows, hidden), jnp.asarray(group_sizes(load, rows, groups))
  w = normal(2, groups, dim, hidden) / dim**0.5
  found = {'dense forward': (jnp.dot, (x, w[0])), 'dense forward and backward': (_three(jnp.dot), (x, w[0], dy))}
  if peer == 'moejax':
    return found | _moejax(shape, load, x, dy, w, sizes)
  if peer == 'tokamax':
    import tokamax
    product = lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes)
    return found | {'tokamax forward': (product, (x, w, sizes)),
                    'tokamax forward and backward': (_three(product), (x, w, dy, sizes))}
  return found | {
      'ragged_dot forward': (jax.lax.ragged_dot, (x, w, sizes)),
      'ragged_dot forward and backward': (_three(jax.lax.ragged_dot), (x, w, dy, sizes)),
      **{f'ragged_dot_mgpu@{"x".join(map(str, tiles))} forward': (
          functools.partial(_ragged_dot_mgpu, tiles), (x, w, sizes)) for tiles in MGPU_TILES}}


def saved_bytes(function, *arguments) -> int:
  """Bytes that a forward pass saves for the backward pass, excluding its arguments, which exist anyway."""
  kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments))
  size = lambda arrays: sum(a.size * a.dtype.itemsize for a in arrays)
  return size(kept) - size(jax.tree.leaves(arguments))


def layer(shape: dict, load: str):
  """A sparse layer (x [T,D], router [D,E], weights) -> [T,D]: scores, top k, a sort, and the expert block."""
  # For loads of 1/rank, scores are lowered by the logarithm of the rank.
  bias = -np.log(np.arange(1, shape['experts'] + 1)) * (load == 'zipf')
  tokens, choices = shape['rows'] // shape['choices'], shape['choices']

  def apply(x, router, weights):
    scores = jnp.dot(x, router, preferred_element_type=jnp.float32) + bias
    weight, expert = jax.lax.top_k(jax.nn.softmax(scores), choices)
    order = jnp.argsort(expert.reshape(-1), stable=True)
    position = jnp.argsort(order).reshape(tokens, choices)
    sizes = jnp.bincount(expert.reshape(-1), length=len(bias))
    routes = kernels.Routes(order // choices, weight.reshape(-1)[order], sizes, position)
    return kernels.expert_block(x, weights, routes, activation=shape['activation'])
  return apply


def dense_layer(shape: dict):
  """A feed-forward (x [T,D], weights of one expert) -> [T,D] on K copies of each token: as many FLOPs as the layer."""
  def apply(x, weights):
    rows = jnp.concatenate([x] * shape['choices'])
    gate = None if weights.wg is None else rows @ weights.wg
    return (activate(shape['activation'], rows @ weights.wi, gate) @ weights.wo).reshape(-1, *x.shape).sum(0)
  return apply


def _moejax(shape, load, x, dy, w, sizes):
  rows, (groups, dim, hidden) = len(x), w.shape
  # Rows are already padded for the kernels, as by the gather of an expert block; the floor has no padding.
  padded, source, _ = padding.pad_groups(sizes, rows, hopper.ROW_MULTIPLE)
  px, pdy = (a.at[source].get(mode='fill', fill_value=0) for a in (x, dy))

  def three(x, w, dy, sizes):
    return hopper.matmul(x, w, sizes), hopper.matmul(dy, w, sizes, transpose=True), hopper.weight_gradient(x, dy, sizes)

  found = {'moejax forward': (hopper.matmul, (px, w, padded)),
           'moejax forward and backward': (three, (px, w, pdy, padded))}
  if shape.get('growth'):
    return found
  found |= {
      'dense dX': (lambda dy, w: dy @ w.T, (dy, w[0])), 'dense dW': (lambda x, dy: x.T @ dy, (x, dy)),
      'moejax dX': (functools.partial(hopper.matmul, transpose=True), (pdy, w, padded)),
      'moejax dW': (hopper.weight_gradient, (px, pdy, padded)),
      'moejax grouped_matmul forward and backward': (_three(kernels.grouped_matmul), (x, w, dy, sizes))}
  if not (dim % fp8.BLOCK or hidden % fp8.BLOCK):
    quantized = *jax.jit(fp8.quantize_rows)(px), *jax.jit(fp8.quantize_matrices)(w)
    product = functools.partial(hopper_fp8.matmul, dtype=jnp.bfloat16)
    found['moejax fp8 forward'] = product, (*quantized, padded)
    found['moejax fp8 with quantised rows forward'] = (
        lambda x, *rest: product(*fp8.quantize_rows(x), *rest), (px, *quantized[2:], padded))

  normal = lambda n, *size: jax.random.normal(jax.random.key(n), size, jnp.bfloat16) / size[-2]**0.5
  weights = kernels.Weights(w, normal(3, groups, hidden, dim),
                            normal(4, groups, dim, hidden) if shape['activation'] in GATES else None)
  tokens, router = x[:rows // shape['choices']], normal(5, dim, groups)
  sparse, one = (layer(shape, load), (tokens, router, weights)), jax.tree.map(lambda w: w[0], weights)
  dense = dense_layer(shape), (tokens, one)
  for name, (function, arguments) in ('moejax layer', sparse), ('dense layer', dense):
    found[f'{name} forward'] = function, arguments
    found[f'{name} forward and backward'] = _value_and_gradients(function), arguments
  return found


def _three(product):
  # A product and both of its gradients.
  def run(x, w, dy, *sizes):
    y, pull = jax.vjp(lambda x, w: product(x, w, *sizes), x, w)
    return y, *pull(dy)
  return run


def _value_and_gradients(function):
  def run(*arguments):
    loss = lambda *arguments: function(*arguments).astype(jnp.float32).sum()
    return jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))(*arguments)
  return run


def _ragged_dot_mgpu(tiles, x, w, sizes):
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu
  names = 'block_m', 'block_n', 'block_k', 'max_concurrent_steps', 'grid_block_n'
  return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, **dict(zip(names, tiles)))


def build(peer: str, shape: dict, load: str):
  """For `gpu_timing.serve`: compiles the peer's programs; reports programs that do not run, with the reason."""
  runs, errors = {}, {}
  for name, (function, arguments) in programs(peer, shape, load).items():
    try:
      compiled = jax.jit(function).lower(*arguments).compile()
      runs[name] = functools.partial(_call, compiled, arguments)
      runs[name](1)
    except Exception as error:  # a peer may fail for any reason; the others continue
      runs.pop(name, None)
      errors[name] = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'[:300]
  facts = {}
  if peer == 'moejax' and not shape.get('growth'):
    facts['saved_bytes'] = saved_bytes(*_sparse(shape, load))
  return runs, errors, facts


def _sparse(shape, load):
  # The layer, and the shapes of its arguments.
  groups, dim, hidden = (shape[name] for name in ('experts', 'dim', 'hidden'))
  array = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
  weights = kernels.Weights(array(groups, dim, hidden), array(groups, hidden, dim),
                            array(groups, dim, hidden) if shape['activation'] in GATES else None)
  return layer(shape, load), array(shape['rows'] // shape['choices'], dim), array(dim, groups), weights


def _call(compiled, arguments, calls):
  for _ in range(calls):
    result = compiled(*arguments)
  jax.block_until_ready(result)


if __name__ == '__main__':
  PEER = sys.argv.pop(1)
  VERSIONS = dict(python=platform.python_version(), jax=jax.__version__, device=jax.devices()[0].device_kind)
  if PEER == 'tokamax':
    VERSIONS['tokamax'] = importlib.metadata.version('tokamax')
  gpu_timing.serve(functools.partial(build, PEER), VERSIONS)
