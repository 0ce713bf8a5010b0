"""Grouped matmul as one masked dense product in float32: E times the work, but simple enough to be a reference."""
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from moejax.kernels.choice import Implementation


def matmul(x: Float[Array, 'M inner'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'],
           transpose: bool = False) -> Float[Array, 'M outer']:
  """x: <float>[M,D], w: <float>[E,D,F] -> <float32>[M,F]; transposed, x: <float>[M,F] -> <float32>[M,D]."""
  formula = 'emf,edf->md' if transpose else 'emd,edf->mf'
  return jnp.einsum(formula, _by_group(x, group_sizes), w.astype(jnp.float32), precision='highest')


def weight_gradient(x: Float[Array, 'M D'], dy: Float[Array, 'M F'],
                    group_sizes: Int[Array, 'E']) -> Float32[Array, 'E D F']:
  """x: <float>[M,D], dy: <float>[M,F] -> <float32>[E,D,F]."""
  return jnp.einsum('emd,emf->edf', _by_group(x, group_sizes), _by_group(dy, group_sizes), precision='highest')


def _by_group(x, group_sizes):
  # <float32>[E,M,D]: the rows of group e, and zeros elsewhere. Selected, not multiplied: 0 * NaN is NaN.
  end = jnp.cumsum(group_sizes)
  row = jnp.arange(x.shape[0])
  mine = (row >= (end - group_sizes)[:, None]) & (row < end[:, None])
  return jnp.where(mine[:, :, None], x.astype(jnp.float32), 0.)


IMPLEMENTATION = Implementation(matmul, weight_gradient)
