"""Recurrent layers, whose state is reset at the start of each document."""
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax import functional
from moejax.layers import initializers
from moejax.layers.sublayer import SUBLAYERS, Axes, Cache, Context, Left, Sublayer

State = tuple[jax.Array, jax.Array]


def lstm_step(state: State, projected: Float[Array, 'B gates'], recurrent: Float[Array, 'D gates']) -> State:
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
    self.dim, self.dtype = dim, dtype
    fan_in = initializers.fan_in(in_axis=0, out_axis=1)
    self.kernel = functional.parameter(rngs, fan_in, (dim, 4 * dim), ('embed', None))
    self.recurrent_kernel = functional.parameter(rngs, fan_in, (dim, 4 * dim), ('embed', None))
    ones_to_forget = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[dim:2 * dim].set(1)
    self.bias = functional.parameter(rngs, ones_to_forget, (4 * dim,), (None,))

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: Cache | None = None, *,
               key: jax.Array | None = None, train: bool = False) -> tuple[Float[Array, 'B S D'], Left]:
    """x: <float>[B,S,D] -> <dtype>[B,S,D]; a document starts at position 0."""
    inputs = context.inputs
    if inputs.positions is None:
      raise ValueError('An LSTM needs the positions of tokens, to know where documents start.')
    starts = inputs.positions == 0
    if cache is None:
      return self.run(x, starts), Left()
    hidden, (state, cell) = self._scan(x, starts, (cache['hidden'], cache['cell']), inputs.valid)
    return hidden, Left(cache=dict(hidden=state, cell=cell))

  def init_cache(self, batch: int, length: int) -> Cache:
    """The state after the latest token."""
    del length
    shape = (batch, self.dim)
    return dict(hidden=jnp.zeros(shape, self.dtype), cell=jnp.zeros(shape, self.dtype))

  def cache_axes(self) -> Axes:
    """See `Sublayer.cache_axes`."""
    return dict(hidden=('batch', 'embed'), cell=('batch', 'embed'))

  def run(self, x: Float[Array, 'B S D'], starts: Bool[Array, 'B S']) -> Float[Array, 'B S D']:
    """x: <float>[B,S,D], starts: <bool>[B,S] starts of documents, where the state is reset to 0 -> <dtype>[B,S,D]."""
    zeros = jnp.zeros((x.shape[0], x.shape[-1]), self.dtype)
    return self._scan(x, starts, (zeros, zeros), None)[0]

  def _scan(self, x: jax.Array, starts: jax.Array, state: State, valid: jax.Array | None) -> tuple[jax.Array, State]:
    # (<dtype>[B,S,D], the state after the last token); where `valid` is False the state stays.
    cast = lambda w: w[...].astype(self.dtype)
    projected = x.astype(self.dtype) @ cast(self.kernel) + cast(self.bias)
    recurrent = cast(self.recurrent_kernel)

    def step(before, inputs):
      projected, start, valid = inputs
      state = jax.tree.map(lambda s: jnp.where(start[:, None], 0, s), before)
      state = lstm_step(state, projected, recurrent)
      if valid is not None:
        state = jax.tree.map(lambda new, old: jnp.where(valid[:, None], new, old), state, before)
      return state, state[0]

    first = lambda a: None if a is None else a.swapaxes(0, 1)
    state, hidden = jax.lax.scan(step, state, (first(projected), first(starts), first(valid)))
    return hidden.swapaxes(0, 1), state
