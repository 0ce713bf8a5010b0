"""Local search for the order of the experts: a permutation is learned, then frozen (COMET, 2306.02824).

A tree groups neighbouring experts, and which experts should be neighbours is not known in advance.
"""
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int
from optax import assignment

from moejax import functional

# At the first and last step of the search, as in mazumder-lab/COMET.
TEMPERATURES, ITERATIONS = (1e-3, 1e-7), (20, 150)


def sinkhorn(logits: Float32[Array, 'E E'], iterations: int | Int[Array, ''], at_most: int) -> Float32[Array, 'E E']:
  """`exp(logits)` with rows, then columns, normalised `iterations` times: nearly doubly stochastic.

  Args:
    logits: <float32>[E,E].
    iterations: may be traced.
    at_most: static upper bound on `iterations`.

  Returns:
    <float32>[E,E] whose columns sum to 1.
  """
  def once(logits, i):
    normalised = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    normalised = normalised - jax.nn.logsumexp(normalised, axis=0, keepdims=True)
    return jnp.where(i < iterations, normalised, logits), None
  return jnp.exp(jax.lax.scan(once, logits, jnp.arange(at_most))[0])


def schedule(step: Int[Array, ''], steps: int) -> tuple[Float32[Array, ''], Int[Array, '']]:
  """(temperature, iterations) of a step: both change linearly over `steps`, the temperature in its logarithm."""
  progress = jnp.clip(step / steps, 0, 1)
  low, high = (jnp.log10(jnp.float32(t)) for t in TEMPERATURES)
  iterations = ITERATIONS[0] + (ITERATIONS[1] - ITERATIONS[0]) * progress
  return 10 ** (low + (high - low) * progress), iterations.astype(jnp.int32)


def hardened(soft: Float32[Array, 'E E']) -> Float32[Array, 'E E']:
  """The permutation matrix P that maximises `sum(P * soft)`; `soft` <float32>[E,E] (Hungarian algorithm)."""
  rows, columns = assignment.hungarian_algorithm(-soft)
  return jnp.zeros_like(soft).at[rows, columns].set(1.)


class LocalSearch(nnx.Module):
  """A soft permutation that is annealed towards a permutation for `steps` training steps, then frozen.

  State: `step`, and `soft`, the last soft permutation; evaluation always uses the permutation nearest to it.
  """

  def __init__(self, *, num_experts: int, steps: int, rngs: nnx.Rngs):
    self.steps = steps
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.05, 0.05)
    self.logits = functional.parameter(rngs, uniform, (num_experts, num_experts), (None, None))
    self.step = functional.router_state(jnp.zeros((), jnp.int32), ())
    self.soft = functional.router_state(jnp.eye(num_experts), (None, None))

  def __call__(self, train: bool) -> Float32[Array, 'E E']:
    """<float32>[E,E]: row e maps leaf e to experts."""
    if not train:
      return hardened(self.soft[...])
    return jax.lax.cond(self.step[...] < self.steps, self._searched, lambda: hardened(self.soft[...]))

  def update(self) -> dict[str, Any]:
    """The state after a training step."""
    soft = jax.lax.cond(self.step[...] < self.steps, lambda: jax.lax.stop_gradient(self._searched()),
                        lambda: self.soft[...])
    return dict(step=self.step[...] + 1, soft=soft)

  def _searched(self):
    temperature, iterations = schedule(self.step[...], self.steps)
    return sinkhorn(self.logits[...] / temperature, iterations, ITERATIONS[1])
