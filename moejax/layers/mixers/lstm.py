"""Recurrent layers, whose state is reset at the start of each document."""
import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.layers import initializers
from moejax.layers.sublayer import SUBLAYERS, Cache, Context, Left, Sublayer

State = tuple[jax.Array, jax.Array]


def lstm_step(state: State, projected: jax.Array, recurrent: jax.Array) -> State:
  """One step of an LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

  The gates are in the order of PyTorch and Flax: input, forget, candidate, output.

  Args:
    state: (h, c), <float>[B,D] each.
    projected: <float>[B,4D] the input's contribution to the gates, including biases.
    recurrent: <float>[D,4D].

  Returns:
    The next (h, c).
  """
  hidden, cell = state
  i, f, g, o = jnp.split(projected + hidden @ recurrent, 4, axis=-1)
  cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


@SUBLAYERS('lstm')
class LSTM(Sublayer):
  """An LSTM over sequences, as wide as its input. The forget gate's bias starts at 1 (Jozefowicz et al. 2015)."""

  def __init__(self, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.dtype = dtype
    fan_in = initializers.fan_in(in_axis=0, out_axis=1)
    self.kernel = functional.parameter(rngs, fan_in, (dim, 4 * dim), ('embed', None))
    self.recurrent_kernel = functional.parameter(rngs, fan_in, (dim, 4 * dim), ('embed', None))
    ones_to_forget = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[dim:2 * dim].set(1)
    self.bias = functional.parameter(rngs, ones_to_forget, (4 * dim,), (None,))

  def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None, *, key: jax.Array | None = None,
               train: bool = False) -> tuple[jax.Array, Left]:
    """x: <float>[B,S,D] -> <dtype>[B,S,D]; a document starts at position 0 of the router's inputs."""
    return self.run(x, context.inputs.positions == 0), Left()

  def run(self, x: jax.Array, starts: jax.Array) -> jax.Array:
    """x: <float>[B,S,D], starts: <bool>[B,S] starts of documents, where the state is reset to 0 -> <dtype>[B,S,D]."""
    cast = lambda w: w[...].astype(self.dtype)
    projected = x.astype(self.dtype) @ cast(self.kernel) + cast(self.bias)
    recurrent = cast(self.recurrent_kernel)

    def step(state, inputs):
      projected, start = inputs
      state = jax.tree.map(lambda s: jnp.where(start[:, None], 0, s), state)
      state = lstm_step(state, projected, recurrent)
      return state, state[0]

    zeros = jnp.zeros((x.shape[0], x.shape[-1]), self.dtype)
    _, hidden = jax.lax.scan(step, (zeros, zeros), (projected.swapaxes(0, 1), starts.swapaxes(0, 1)))
    return hidden.swapaxes(0, 1)
