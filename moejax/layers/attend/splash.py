"""Attention by JAX's splash kernel on TPU: blocks that the mask forbids cost neither time nor memory.

The kernel is a Pallas program, which XLA cannot partition: on a mesh it runs in a `jax.shard_map` over batch and heads.
"""
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float

from moejax.kernels.target import Target, target
from moejax.layers.attend.blind import without_blind
from moejax.layers.attend.inputs import DROPS, AttentionInputs, AttentionKernel, Mask
from moejax.parallel import rules

LANES = 128  # lengths are multiples of this
BLOCK = 512  # the largest block; a smaller one where it does not divide the length


def attend(inputs: AttentionInputs) -> Float[Array, 'B S H v']:
  """-> <float>[B,S,H,v]."""
  mask = inputs.mask or Mask()
  segments = None
  if mask.query_segments is not None and mask.key_segments is not None:
    segments = splash_attention.SegmentIds(mask.query_segments, mask.key_segments)
  # The kernel has no scale.
  queries = (inputs.queries * inputs.scale).astype(inputs.queries.dtype)

  def run(queries, keys, values, segments, sinks):
    # [B,S,H,k] -> [B,H,S,k], and back.
    queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
    kernel = _kernel(mask, queries.shape[1], (queries.shape[2], keys.shape[2]), inputs.cap)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(queries, keys, values, segments, sinks)
    return jnp.swapaxes(out, 1, 2)

  mesh = rules.active()
  if mesh is not None and mesh.size > 1:
    # Queries' heads stay with the keys and values that they read.
    whole = rules.activation_spec(('batch', 'length', 'kv_heads', 'head_dim'), inputs.keys.shape)
    row, heads = jax.sharding.PartitionSpec(whole[0]), jax.sharding.PartitionSpec(whole[2])
    run = jax.shard_map(run, mesh=mesh, in_specs=(whole, whole, whole, row, heads), out_specs=whole, check_vma=False)
  out = run(queries, inputs.keys, inputs.values, segments, inputs.sinks)
  return without_blind(out, inputs.values, mask, inputs.sinks)


def _kernel(mask, heads, lengths, cap):
  splash: Any = splash_attention
  if mask.window is not None:
    behind = mask.window - 1
    places = splash.LocalMask(lengths, (behind, 0 if mask.causal else behind), offset=0)
  else:
    places = splash.CausalMask(lengths) if mask.causal else splash.FullMask(lengths)
  of_queries, of_keys = (math.gcd(length, BLOCK) for length in lengths)
  blocks = splash.BlockSizes(block_q=of_queries, block_kv=of_keys, block_q_dkv=of_queries, block_kv_dkv=of_keys,
                             block_q_dq=of_queries, block_kv_dq=of_keys)
  return splash.make_splash_mha(splash.MultiHeadMask([places] * heads), block_sizes=blocks, head_shards=1,
                                q_seq_shards=1, attn_logits_soft_cap=cap, interpret=target().interpret)


def limit(target: Target, inputs: AttentionInputs) -> str | None:
  """One sentence on why the target cannot run the inputs, or None if it can."""
  if target.platform != 'tpu':
    return f"splash is for TPU, not {target.platform}: use 'chunked', or None to choose by platform."
  if inputs.drop is not None:
    return DROPS
  if inputs.bias is not None:
    return "splash knows no bias of the logits: use 'chunked', or 'plain'."
  mask = inputs.mask or Mask()
  if mask.query_positions is not None or mask.key_positions is not None or mask.prefix is not None:
    return "splash knows places before any value, and no prefix: with a cache or a prefix use 'chunked'."
  lengths = inputs.queries.shape[1], inputs.keys.shape[1]
  if any(length % LANES for length in lengths):
    return f"splash needs multiples of {LANES} queries and keys, not {lengths[0]} and {lengths[1]}: use 'chunked'."
  if inputs.queries.dtype not in (jnp.float32, jnp.bfloat16):
    return f"splash is for bfloat16 and float32, not {jnp.dtype(inputs.queries.dtype).name}: use 'chunked'."
  return None


KERNEL = AttentionKernel(attend, limit)
