"""Differentiable sparse selection: smooth cubic steps, whose products select experts.

The smooth step is from "The Tree Ensemble Layer" (Hazimeh et al. 2020, arXiv 2002.07772). DSelect-k (2106.03760)
selects by binary codes of smooth steps, COMET (2306.02824) by trees of them.
"""
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float32
import numpy as np

# Added inside logarithms, as in the published code of both papers.
EPSILON = 1e-6


def smooth_step(z: Float32[Array, '...'], gamma: float) -> Float32[Array, '...']:
  """0 up to -gamma/2, 1 from gamma/2 on, and between them the cubic that makes it continuously differentiable.

  Args:
    z: <float32>[...].
    gamma: width of the step.

  Returns:
    <float32>[...] in [0, 1], exactly 0 and 1 outside the step.
  """
  # Clipped, so that the cubic is finite where it is masked: NaN there would poison gradients.
  inside = jnp.clip(z, -gamma / 2, gamma / 2)
  cubic = -2 * inside**3 / gamma**3 + 3 * inside / (2 * gamma) + 0.5
  return jnp.where(z <= -gamma / 2, 0., jnp.where(z >= gamma / 2, 1., cubic))


@functools.lru_cache
def binary_codes(num_experts: int) -> np.ndarray:
  """<bool>[E,M] the binary digits of every expert's index, most significant first; M = ceil(log2(E))."""
  bits = (num_experts - 1).bit_length()
  return (np.arange(num_experts)[:, None] >> np.arange(bits)[::-1]) % 2 == 1


def select_by_code(steps: Float32[Array, '... M'], num_experts: int) -> Float32[Array, '... E']:
  """The product over bits of `s` where the expert's code is one, and `1 - s` elsewhere (DSelect-k, equation 4).

  Args:
    steps: <float32>[..., M].
    num_experts: E; sums over experts are 1 if it is a power of two, otherwise at most 1.

  Returns:
    <float32>[..., E].
  """
  codes = binary_codes(num_experts)
  selected = jnp.ones((*steps.shape[:-1], num_experts), steps.dtype)
  for bit in range(codes.shape[1]):
    selected *= jnp.where(codes[:, bit], steps[..., bit, None], 1 - steps[..., bit, None])
  return selected


@functools.lru_cache
def tree_paths(num_experts: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
  """The path to every leaf of the full binary tree in heap order: node 0 is the root, j's children are 2j+1 and 2j+2.

  Returns:
    For each depth `(node <int>[E], left <bool>[E], there <bool>[E])`: the inner node on the path to the leaf, whether
    the path goes left there, and whether it is that long. Leaf e is node E-1+e.
  """
  node = np.arange(num_experts) + num_experts - 1
  steps = []
  while (node > 0).any():
    parent = np.maximum((node - 1) // 2, 0)
    steps.append((parent, node % 2 == 1, node > 0))
    node = parent
  return tuple(steps)


def select_by_tree(steps: Float32[Array, '... nodes'], num_experts: int) -> Float32[Array, '... E']:
  """The probability of each leaf if node j goes left with probability `s_j` (COMET, section 3.1).

  Args:
    steps: <float32>[..., E-1], for the inner nodes in heap order.
    num_experts: E, not necessarily a power of two.

  Returns:
    <float32>[..., E] summing to 1.
  """
  reached = jnp.ones((*steps.shape[:-1], num_experts), steps.dtype)
  for node, left, there in tree_paths(num_experts):
    taken = steps[..., np.where(there, node, 0)]
    reached *= jnp.where(there, jnp.where(left, taken, 1 - taken), 1.)
  return reached
