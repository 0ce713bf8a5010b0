"""The fused expert block: gather rows, two matmuls with an activation between them, and a weighted sum into tokens.

    y[token[m]] += weight[m] * (act(x[token[m]] wi + bi) wo + bo)        with the matrices of the expert of row m

An implementation may fuse all of it (`block`); for the others it is composed here, forward and backward, from their
grouped matmuls. The backward pass saves `x` and the pre-activations (SonicMoE, arXiv:2512.14080): it gathers the rows
and computes the hidden layer again, and does not need the experts' outputs.
"""
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.kernels import routes as routes_lib
from moejax.kernels.choice import Implementation, Name, Shape, choose
from moejax.kernels.routes import Routes, Weights, combine, take

Activation = Literal['gelu', 'relu', 'silu', 'squared_relu', 'geglu', 'reglu', 'swiglu']

# gelu is the tanh approximation; squared ReLU is So et al. 2021 (Primer).
ACTIVATIONS = {'gelu': jax.nn.gelu, 'relu': jax.nn.relu, 'silu': jax.nn.silu,
               'squared_relu': lambda x: jnp.square(jax.nn.relu(x))}
# Shazeer 2020, "GLU variants improve transformer", eq. 6: act(x Wg) * (x Wi).
GATES = {'geglu': jax.nn.gelu, 'reglu': jax.nn.relu, 'swiglu': jax.nn.silu}
assert set(ACTIVATIONS) | set(GATES) == set(get_args(Activation))


def expert_block(x: Float[Array, 'N D'], weights: Weights, routes: Routes, *, activation: Activation,
                 implementation: Name | None = None) -> Float[Array, 'N D']:
  """Applies the feed-forward of its expert to each row of `routes`, and sums the rows of each token.

  Args:
    x: <float>[N,D].
    weights: of the dtype of `x`; with `wg` if and only if `activation` is gated.
    routes: M rows.
    activation: e.g. 'gelu', or gated 'swiglu'. Computed in float32.
    implementation: of the grouped matmul; None: by platform and shape (see `explain`).

  Returns:
    <float>[N,D] of the dtype of `x`; sums are float32.

  Raises:
    ValueError: shapes or dtypes do not match, or the implementation cannot run them here.
  """
  _check(x, weights, routes, activation)
  num_experts, dim, hidden = weights.wi.shape
  rows = routes.token.shape[0]
  chosen = choose(implementation, Shape(rows, num_experts, dim, hidden, x.dtype),
                  Shape(rows, num_experts, hidden, dim, x.dtype))
  if rows == 0:
    return jnp.zeros_like(x)
  return _expert_block(chosen, activation, x, weights, routes_lib.ungrouped_nowhere(routes))


def activate(activation: Activation, zi: Float[Array, '... F'],
             zg: Float[Array, '... F'] | None) -> Float[Array, '... F']:
  """The hidden layer from the pre-activations: act(zi), or act(zg) * zi if the activation is gated."""
  return ACTIVATIONS[activation](zi) if zg is None else GATES[activation](zg) * zi


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_block(implementation, activation, x, weights, routes):
  return _run(implementation, activation, x, weights, routes, save=False)[0]


def _forward(implementation, activation, x, weights, routes):
  y, saved = _run(implementation, activation, x, weights, routes, save=True)
  return y, (x, weights, routes, saved)


def _backward(implementation, activation, residuals, dy):
  x, weights, routes, saved = residuals
  backward = implementation.block.backward if implementation.block else _composed_backward(implementation)
  dx, dweights, dweight = backward(x, weights, routes, activation, saved, dy)
  dweights = jax.tree.map(lambda gradient, w: gradient.astype(w.dtype), dweights, weights)
  nothing: Any = None  # indices have no gradient
  return dx.astype(x.dtype), dweights, Routes(nothing, dweight, nothing, None)


_expert_block.defvjp(_forward, _backward)


def _run(implementation, activation, x, weights, routes, save):
  forward = implementation.block.forward if implementation.block else _composed_forward(implementation)
  y, saved = forward(x, weights, routes, activation, save)
  return y.astype(x.dtype), saved


def _composed_forward(implementation: Implementation):
  def forward(x, weights, routes, activation, save):
    routes, _, expert = _laid_out(implementation, routes)
    rows = take(x, routes.token)
    if implementation.up and weights.bi is None and weights.bg is None:
      hidden, zi, zg = implementation.up(rows, weights.wi, weights.wg, routes.group_sizes, activation)
    else:
      zi = _affine(implementation, rows, weights.wi, weights.bi, routes, expert)
      zg = None if weights.wg is None else _affine(implementation, rows, weights.wg, weights.bg, routes, expert)
      hidden = _activate(activation, zi, zg).astype(x.dtype)
    y = _affine(implementation, hidden, weights.wo, weights.bo, routes, expert)
    return combine(y, routes, routes.weight, x.shape[0]), (zi, zg) if save else None
  return forward


def _composed_backward(implementation: Implementation):
  def backward(x, weights, routes, activation, saved, dy):
    routes, place, expert = _laid_out(implementation, routes)
    low = lambda a: a.astype(x.dtype)
    matmul = lambda rows, w: implementation.matmul(low(rows), w, routes.group_sizes, transpose=True)
    gradient = lambda rows, d: implementation.weight_gradient(low(rows), low(d), routes.group_sizes)
    by_expert = lambda d, b: None if b is None else jax.ops.segment_sum(d, expert, b.shape[0], True)

    hidden, pull = jax.vjp(functools.partial(_activate, activation), *saved)
    d = take(dy.astype(x.dtype), routes.token)
    dhidden = matmul(d, weights.wo).astype(jnp.float32)
    dzi, dzg = pull(dhidden * routes.weight[:, None])
    dweight = (dhidden * hidden).sum(1)
    if weights.bo is not None:
      dweight = dweight + (d * take(weights.bo, expert)).astype(jnp.float32).sum(1)
    d = d * routes.weight[:, None]

    rows = take(x, routes.token)
    dx, dwg = matmul(dzi, weights.wi).astype(jnp.float32), None
    if weights.wg is not None:
      dx, dwg = dx + matmul(dzg, weights.wg), gradient(rows, dzg)
    gradients = Weights(wi=gradient(rows, dzi), wo=gradient(hidden, d), wg=dwg, bi=by_expert(dzi, weights.bi),
                        bg=by_expert(dzg, weights.bg), bo=by_expert(d, weights.bo))
    return combine(dx, routes, None, x.shape[0]), gradients, take(dweight[:, None], place)[:, 0]
  return backward


def _laid_out(implementation, routes):
  # Routes padded for the kernels, the new position of each row, and the expert of each row (E for none).
  place = jnp.arange(routes.token.shape[0])
  if implementation.row_multiple > 1:
    routes, place = routes_lib.pad(routes, implementation.row_multiple)
  row = jnp.arange(routes.token.shape[0])
  return routes, place, jnp.searchsorted(jnp.cumsum(routes.group_sizes), row, side='right')


def _affine(implementation, rows, w, b, routes, expert):
  y = implementation.matmul(rows, w, routes.group_sizes).astype(rows.dtype)
  return y if b is None else y + take(b, expert)


def _activate(activation, zi, zg):
  return activate(activation, zi.astype(jnp.float32), None if zg is None else zg.astype(jnp.float32))


def _check(x, weights, routes, activation):
  def expect(fits, what, got):
    if not fits:
      raise ValueError(f'expert_block needs {what}, not {got}.')
  num_experts, dim, hidden = weights.wi.shape
  expect(x.ndim == 2 and x.shape[1] == dim, f'x [N,{dim}] to match wi {weights.wi.shape}', x.shape)
  expect((weights.wg is not None) == (activation in GATES),
         f"weights.wg if and only if the activation is gated ({', '.join(sorted(GATES))})", activation)
  shapes = dict(wi=(num_experts, dim, hidden), wo=(num_experts, hidden, dim), wg=(num_experts, dim, hidden),
                bi=(num_experts, hidden), bg=(num_experts, hidden), bo=(num_experts, dim))
  for name, shape in shapes.items():
    w = getattr(weights, name)
    expect(w is None or w.shape == shape, f'weights.{name} {shape}', getattr(w, 'shape', None))
    expect(w is None or w.dtype == x.dtype, f'weights.{name} of the dtype of x, {x.dtype}', getattr(w, 'dtype', None))
  expect(routes.group_sizes.shape == (num_experts,), f'routes.group_sizes [{num_experts}]', routes.group_sizes.shape)
  expect(routes.weight.shape == routes.token.shape, f'routes.weight {routes.token.shape}', routes.weight.shape)
  expect(routes.position is None or routes.position.shape[:1] == x.shape[:1], f'routes.position [{x.shape[0]},K]',
         None if routes.position is None else routes.position.shape)
