"""Attention by cuDNN's fused kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Within a row, causal attention and its window cost no memory, and blocks outside of them no time. Anything else of a mask
becomes a bias of [B|1,1,S,T], for all heads at once: the kernel has no segments in the middle of rows.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.kernels.target import Target
from moejax.layers.attend.blind import without_blind
from moejax.layers.attend.inputs import DROPS, AttentionInputs, AttentionKernel, Mask


def attend(inputs: AttentionInputs) -> Float[Array, 'B S H v']:
  """-> <float>[B,S,H,v]."""
  out = _attend(inputs.queries, inputs.keys, inputs.values, inputs.mask, inputs.scale)
  return without_blind(out, inputs.values, inputs.mask)


def _attend(queries, keys, values, mask, scale):
  mask = mask or Mask()
  length, kv_length = queries.shape[1], keys.shape[1]
  # As the kernel counts places, which are those of a row of queries and keys.
  by_kernel = (mask.causal and mask.prefix is None and mask.query_positions is None and mask.key_positions is None
               and length == kv_length)
  rest = dataclasses.replace(mask, causal=False, window=None) if by_kernel else mask
  window: Any = (mask.window - 1, 0) if by_kernel and mask.window is not None else None
  return jax.nn.dot_product_attention(queries, keys, values, mask=rest.dense(length, kv_length), scale=scale,
                                      is_causal=by_kernel, local_window_size=window, implementation='cudnn')


def limit(target: Target, inputs: AttentionInputs) -> str | None:
  """One sentence on why the target cannot run the inputs, or None if it can."""
  if target.platform != 'gpu':
    return f"cuDNN is for NVIDIA GPUs, not {target.platform}: use 'chunked', or None to choose by platform."
  if target.interpret:
    return "cuDNN has nothing that could be interpreted: use 'chunked'."
  if inputs.drop is not None:
    return DROPS
  for what, value in ('sinks', inputs.sinks), ('a cap of the logits', inputs.cap):
    if value is not None:
      return f"cuDNN's attention knows no {what.removeprefix('a ')}: use 'chunked'."
  if inputs.bias is not None:
    return f"cuDNN would round the bias to {jnp.dtype(inputs.queries.dtype).name}: use 'chunked', or 'plain'."

  def gradients(queries, keys, values, mask):
    return jax.vjp(lambda q, k, v: _attend(q, k, v, mask, inputs.scale), queries, keys, values)[0]

  try:  # jax knows the limits of the cuDNN that is installed, and those of the backward pass are narrower.
    jax.eval_shape(gradients, inputs.queries, inputs.keys, inputs.values, inputs.mask)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return f"cuDNN: {str(error).rstrip('.')}; use 'chunked', or None to choose by platform and sizes."
  return None


KERNEL = AttentionKernel(attend, limit)
