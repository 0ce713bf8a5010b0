"""Attention by `tokamax.dot_product_attention`, which picks one of tokamax's kernels, if tokamax is installed.

`pip install tokamax`; it needs Python 3.12 and JAX 0.11.1. For comparison; never the default.
"""
import dataclasses
import importlib
import importlib.util
from typing import Any

from jaxtyping import Array, Float

from moejax.kernels.target import Target
from moejax.layers.attend.blind import without_blind
from moejax.layers.attend.inputs import DROPS, AttentionInputs, AttentionKernel, Mask


def attend(inputs: AttentionInputs) -> Float[Array, 'B S H v']:
  """-> <float>[B,S,H,v]."""
  tokamax: Any = importlib.import_module('tokamax')
  mask = inputs.mask or Mask()
  length, kv_length = inputs.queries.shape[1], inputs.keys.shape[1]
  causal = mask.causal and mask.prefix is None and mask.query_positions is None and mask.key_positions is None
  rest = dataclasses.replace(mask, causal=False) if causal else mask
  out = tokamax.dot_product_attention(
      inputs.queries, inputs.keys, inputs.values, bias=inputs.bias, mask=rest.dense(length, kv_length),
      scale=inputs.scale, is_causal=causal, logits_soft_cap=inputs.cap)
  return without_blind(out, inputs.values, mask)


def limit(target: Target, inputs: AttentionInputs) -> str | None:
  """One sentence on why the target cannot run the inputs, or None if it can."""
  del target  # tokamax falls back to XLA.
  if importlib.util.find_spec('tokamax') is None:
    return "tokamax is not installed: `pip install tokamax` (Python 3.12 and JAX 0.11.1 or newer), or use 'chunked'."
  if inputs.drop is not None:
    return DROPS
  if inputs.sinks is not None:
    return "tokamax's attention knows no sinks: use 'chunked'."
  if inputs.cap is not None and inputs.bias is not None:
    return "tokamax adds the bias before the cap, not after it: use 'chunked', or 'plain'."
  return None


KERNEL = AttentionKernel(attend, limit)
