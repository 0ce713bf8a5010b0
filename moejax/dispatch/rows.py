"""Moving rows to where experts compute them, and back: buffers across devices, gathers with gathers as gradients."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels import routes
from moejax.parallel import rules


def to_buffers(rows: Float[Array, 'G E C D']) -> Float[Array, 'E G*C D']:
  """rows: <float>[G,E,C,D] -> <float>[E,G*C,D]. On a mesh this sends tokens to their experts: one all-to-all."""
  groups, experts, capacity, dim = rows.shape
  rows = rules.constrain(rows, ('group', None, None, None))
  rows = rows.swapaxes(0, 1).reshape(experts, groups * capacity, dim)
  return rules.constrain(rows, ('expert', 'slot', None))


def from_buffers(rows: Float[Array, 'E slots D'], groups: int) -> Float[Array, 'G E C D']:
  """rows: <float>[E,G*C,D] -> <float>[G,E,C,D]. On a mesh this sends them back."""
  rows = rules.constrain(rows, ('expert', 'slot', None))
  rows = rows.reshape(rows.shape[0], groups, -1, rows.shape[-1]).swapaxes(0, 1)
  return rules.constrain(rows, ('group', None, None, None))


@jax.custom_vjp
def take_rows(x: Float[Array, 'G N D'], source: Int[Array, 'G M'], users: Int[Array, 'G N K']) -> Float[Array, 'G M D']:
  """Row m of the result is `x[source[m]]`, or zeros where `source[m]` is N. The gradient is a gather, not a scatter.

  Args:
    x: <float>[G,N,D].
    source: <int32>[G,M].
    users: <int32>[G,N,K] the inverse: the rows m whose source is n, filled up with M to K.

  Returns:
    <float>[G,M,D].
  """
  del users
  return take_or_zeros(x, source)


def _take_rows_forward(x, source, users):
  return take_or_zeros(x, source), users


def _take_rows_backward(users, dy):
  # K gathers of [G,N,D]: one of [G,N,K,D] summed over K is several times slower on CPUs.
  return routes.sum_over_choices(lambda k: take_or_zeros(dy, users[..., k]), users.shape[2]), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def sum_choices(y: Float[Array, 'G M D'], row: Int[Array, 'G S K'], choice: Int[Array, 'G M'],
                weight: Float[Array, 'G S K']) -> Float[Array, 'G S D']:
  """The weighted sum of each token's K rows; as in `take_rows`, gradients are gathers.

  Args:
    y: <float>[G,M,D].
    row: <int32>[G,S,K] row of each choice; M for none.
    choice: <int32>[G,M] the inverse: the choice s*K+k of each row; S*K for none.
    weight: <float>[G,S,K].

  Returns:
    <float>[G,S,D].
  """
  del choice
  return routes.sum_over_choices(lambda k: weight[..., k, None] * take_or_zeros(y, row[..., k]), row.shape[2])


def _sum_choices_forward(y, row, choice, weight):
  return sum_choices(y, row, choice, weight), (y, row, choice, weight)


def _sum_choices_backward(residuals, dout):
  y, row, choice, weight = residuals
  groups, _, choices = row.shape
  of_row = take_or_zeros(weight.reshape(groups, -1, 1), choice)
  dy = of_row * take_or_zeros(dout, choice // choices)
  # As an einsum: XLA's CPU backend vectorises it, but not a sum over the last axis fused with a gather.
  of_choice = lambda k: jnp.einsum('gsd,gsd->gs', take_or_zeros(y, row[..., k]), dout)
  dweight = routes.stack_over_choices(of_choice, choices)
  return dy.astype(y.dtype), None, None, dweight.astype(weight.dtype)


sum_choices.defvjp(_sum_choices_forward, _sum_choices_backward)


def take_or_zeros(x: Float[Array, 'G N D'], source: Int[Array, 'G M']) -> Float[Array, 'G M D']:
  """x: <float>[G,N,D], source: <int32>[G,M] -> <float>[G,M,D]; zeros where `source` is N."""
  return jax.vmap(lambda x, source: x.at[source].get(mode='fill', fill_value=0))(x, source)


def add_rows(y: Float[Array, 'G M D'], target: Int[Array, 'G M'], num_rows: int) -> Float[Array, 'G N D']:
  """y: <float>[G,M,D], target: <int32>[G,M] -> <float>[G,N,D] sums of the rows by target; target N is dropped."""
  zeros = jnp.zeros((num_rows, y.shape[-1]), y.dtype)
  return jax.vmap(lambda y, target: zeros.at[target].add(y, mode='drop'))(y, target)
