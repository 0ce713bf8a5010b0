"""Attention with all logits in memory: what the others are compared with, and the fastest for short sequences."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.layers.attend.inputs import AttentionInputs, AttentionKernel


def attend(inputs: AttentionInputs) -> Float[Array, 'B S H v']:
  """Softmax attention; logits and weights are float32 (float64 for float64 inputs). -> <float>[B,S,H,v]."""
  queries, keys, values = inputs.queries, inputs.keys, inputs.values
  batch, length, heads, _ = queries.shape
  kv_heads = keys.shape[2]
  wide = accumulator(queries)
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, -1)
  logits = jnp.einsum('bsnrk,btnk->bnrst', grouped, keys, preferred_element_type=wide)
  logits = logits.reshape(batch, heads, length, -1) * inputs.scale
  if inputs.cap is not None:
    logits = inputs.cap * jnp.tanh(logits / inputs.cap)
  if inputs.bias is not None:
    logits = logits + inputs.bias
  mask = None if inputs.mask is None else inputs.mask.dense(length, keys.shape[1])
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(wide).min)
  weights = _softmax(logits, inputs.sinks)
  if inputs.drop is not None:
    weights = inputs.drop(weights)
  weights = weights.astype(values.dtype).reshape(batch, kv_heads, heads // kv_heads, length, -1)
  return jnp.einsum('bnrst,btnk->bsnrk', weights, values).reshape(queries.shape[:-1] + values.shape[-1:])


def accumulator(x: Float[Array, '...']) -> jax.typing.DTypeLike:
  """The dtype of logits, weights and sums over keys."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _softmax(logits, sinks):
  if sinks is None:
    return jax.nn.softmax(logits)
  column = jnp.broadcast_to(sinks.astype(logits.dtype)[:, None, None], (*logits.shape[:-1], 1))
  return jax.nn.softmax(jnp.concatenate([logits, column], axis=-1))[..., :-1]


KERNEL = AttentionKernel(attend)
