"""Token embeddings, linear layers and output heads."""
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from moejax import functional
from moejax.layers import initializers
from moejax.parallel import rules


class Embedding(nnx.Module):
  """A vector per token; `attend` uses the transposed table as an output layer with tied weights."""

  def __init__(self, *, vocab_size: int, dim: int, init: Mapping, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.dtype = dtype
    initializer = initializers.build(init, '.embedding_init', in_axis=0, out_axis=1)
    self.table = functional.parameter(rngs, initializer, (vocab_size, dim), ('vocab', 'embed'))

  def __call__(self, tokens: Int[Array, 'B S']) -> Float[Array, 'B S D']:
    """tokens: <int32>[B,S] -> <dtype>[B,S,D]."""
    # Whole rows: otherwise the compiler gathers the tokens' vectors of all devices instead of the table over `fsdp`.
    table = rules.constrain(self.table[...].astype(self.dtype), ('vocab', None))
    return table[tokens]

  def attend(self, x: Float[Array, '... D']) -> Float32[Array, '... V']:
    """x: <float>[...,D] -> <float32>[...,V], the product with every row."""
    table = self.table[...].astype(self.dtype)
    return jnp.einsum('...d,vd->...v', x.astype(self.dtype), table, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
  """`x @ kernel + bias`."""

  def __init__(self, *, shape: tuple[int, int], axes: tuple[str | None, str | None], init, dtype: jnp.dtype,
               rngs: nnx.Rngs, bias_init=None):
    self.dtype = dtype
    self.kernel = functional.parameter(rngs, init, shape, axes)
    self.bias = None if bias_init is None else functional.parameter(rngs, bias_init, shape[1:], axes[1:])

  def __call__(self, x: Float[Array, '... I'], out_dtype: jnp.dtype | None = None) -> Float[Array, '... O']:
    """x: <float>[...,I] -> <out_dtype>[...,O]; sums are in `out_dtype` too, by default the compute dtype."""
    out_dtype = out_dtype or self.dtype
    y = jnp.einsum('...i,io->...o', x.astype(self.dtype), self.kernel[...].astype(self.dtype),
                   preferred_element_type=out_dtype)
    return y if self.bias is None else y + self.bias[...].astype(out_dtype)


class TokenHead(nnx.Module):
  """Logits over the vocabulary, with its own weights or tied to the input embedding.

  `kind`:
    untied: its own kernel.
    tied: the embedding table (1608.05859).
    tied_scaled: the embedding table divided by sqrt(D), for embeddings of unit variance (T5, 1910.10683).
  """

  def __init__(self, kind: str, *, vocab_size: int, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs):
    self.kind = kind
    self.linear = Linear(shape=(dim, vocab_size), axes=('embed', 'vocab'), dtype=dtype, rngs=rngs,
                         init=initializers.fan_in(in_axis=0, out_axis=1)) if kind == 'untied' else None

  def __call__(self, x: Float[Array, 'B S D'], embedding: Embedding) -> Float32[Array, 'B S V']:
    """x: <float>[B,S,D] -> <float32>[B,S,V]."""
    if self.linear is not None:
      logits = self.linear(x, jnp.float32)
    else:
      logits = embedding.attend(x * x.shape[-1] ** -0.5 if self.kind == 'tied_scaled' else x)
    return rules.constrain(logits, ('batch', 'length', 'vocab'))
