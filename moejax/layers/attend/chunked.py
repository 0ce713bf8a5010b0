"""Attention whose memory grows linearly: blocks of queries against blocks of keys, with a running softmax.

The softmax over all keys is put together from blocks of keys (2112.05682); the backward pass computes each block's weights
again from the logarithm of their sum (2205.14135, algorithms 2 and 4). Plain JAX, made for CPUs; it runs anywhere.

Axis letters: B batch, N heads of keys and values, R queries' heads that share one, s queries of a block, t keys of a block.
"""
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from moejax.layers.attend.blind import average_where_blind
from moejax.layers.attend.inputs import DROPS, EMPTY, AttentionInputs, AttentionKernel, Mask
from moejax.layers.attend.plain import accumulator

# Tokens of a block.
QUERIES = 128
KEYS = 128


class _Steps(NamedTuple):
  """What is known before any value.

  Attributes:
    pairs: numbers of a block of queries and one of keys that it may see, in the order of their turn.
    size: queries and keys of a block.
  """
  pairs: tuple[tuple[int, int], ...]
  size: tuple[int, int]
  scale: float
  cap: float | None


class _Blocks(NamedTuple):
  """The inputs, cut along their tokens.

  Attributes:
    queries: [blocks,B,N,R,s,k].
    keys: [blocks,B,N,t,k].
    values: [blocks,B,N,t,v].
    bias: [B|1,1|N,1|R,S,T], whole, or None.
    sinks: [N,R], or None.
    mask: each field with a leading axis of blocks.
  """
  queries: jax.Array
  keys: jax.Array
  values: jax.Array
  bias: jax.Array | None
  sinks: jax.Array | None
  mask: Mask


class _Sums(NamedTuple):
  """The running softmax of queries over the keys so far.

  Attributes:
    top: <float32>[...,B,N,R,s], the largest logit.
    total: <float32>[...,B,N,R,s], the sum of exp(logit - top).
    values: <float32>[...,B,N,R,s,v], the sum of values times that.
  """
  top: Float32[Array, '... B N R s']
  total: Float32[Array, '... B N R s']
  values: Float32[Array, '... B N R s v']


def attend(inputs: AttentionInputs) -> Float[Array, 'B S H v']:
  """-> <float>[B,S,H,v]; memory for gradients is that of inputs and output."""
  steps, blocks = _cut(inputs)
  both: Any = _attend(steps, blocks)
  out, seeing = both
  batch, length, heads, _ = inputs.queries.shape
  whole = lambda x: jnp.moveaxis(x, (0, 4), (1, 2)).reshape(batch, -1, heads, *x.shape[5:])[:, :length]
  if inputs.sinks is not None:
    return whole(out)
  return average_where_blind(whole(out), inputs.values, whole(seeing))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(steps, blocks):
  # Outputs [blocks,B,N,R,s,v], 0 for queries that see no key, and whether they do [blocks,B,N,R,s].
  return _forward(steps, blocks)[0]


def _forward(steps, blocks):
  def step(sums, pair):
    i, j = pair
    logits, _ = _logits(steps, blocks, i, j)
    before = jax.tree.map(lambda x: _at(x, i), sums)
    top = jnp.maximum(before.top, logits.max(axis=-1))
    shares, faded = jnp.exp(logits - top[..., None]), jnp.exp(before.top - top)
    values = _at(blocks.values, j)
    added = jnp.einsum('bnrst,bntv->bnrsv', shares.astype(values.dtype), values, preferred_element_type=logits.dtype)
    after = _Sums(top, before.total * faded + shares.sum(axis=-1), before.values * faded[..., None] + added)
    return jax.tree.map(lambda x, new: _put(x, new, i), sums, after), None

  queries, values = blocks.queries, blocks.values
  wide = accumulator(queries)
  lowest = jnp.full(queries.shape[:-1], jnp.finfo(wide).min, wide)
  nothing = jnp.zeros((*queries.shape[:-1], values.shape[-1]), wide)
  start = _Sums(lowest, jnp.zeros_like(lowest), nothing)
  if blocks.sinks is not None:
    # A sink is a key before the others, without a value.
    start = _Sums(jnp.maximum(lowest, blocks.sinks[..., None]), jnp.ones_like(lowest), nothing)
  sums = _scan(step, start, steps)
  seeing = sums.total > 0
  out = (sums.values / jnp.where(seeing, sums.total, 1)[..., None]).astype(values.dtype)
  log_total = jnp.where(seeing, sums.top + jnp.log(sums.total), 0)
  return (out, seeing), (blocks, out, log_total)


def _backward(steps, residuals, cotangents):
  blocks, out, log_total = residuals
  wide = log_total.dtype
  dout = cotangents[0]
  # What a query's softmax loses when one of its logits gains.
  mean = jnp.einsum('...v,...v->...', dout, out, preferred_element_type=wide)

  def step(gradients, pair):
    i, j = pair
    dqueries, dkeys, dvalues, dbias = gradients
    queries, keys, values = _at(blocks.queries, i), _at(blocks.keys, j), _at(blocks.values, j)
    logits, slope = _logits(steps, blocks, i, j)
    weights = jnp.exp(logits - _at(log_total, i)[..., None])
    dvalue = jnp.einsum('bnrst,bnrsv->bntv', weights.astype(values.dtype), _at(dout, i), preferred_element_type=wide)
    dweights = jnp.einsum('bnrsv,bntv->bnrst', _at(dout, i), values, preferred_element_type=wide)
    dlogits = weights * (dweights - _at(mean, i)[..., None])
    if blocks.bias is not None:
      dbias = _add_bias(dbias, dlogits, steps, i, j)
    dproducts = (dlogits * slope * steps.scale).astype(queries.dtype)
    dquery = jnp.einsum('bnrst,bntk->bnrsk', dproducts, keys, preferred_element_type=wide)
    dkey = jnp.einsum('bnrst,bnrsk->bntk', dproducts, queries, preferred_element_type=wide)
    return (_put(dqueries, _at(dqueries, i) + dquery, i), _put(dkeys, _at(dkeys, j) + dkey, j),
            _put(dvalues, _at(dvalues, j) + dvalue, j), dbias), None

  zeros: Any = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), (*blocks[:3], blocks.bias))
  gradients = _scan(step, zeros, steps)
  dsinks = None
  if blocks.sinks is not None:
    dsinks = -(jnp.exp(blocks.sinks[..., None] - log_total) * mean).sum(axis=(0, 1, 4))
  floats = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), (*gradients, dsinks), tuple(blocks[:5]))
  without: Any = None  # integers have no gradient
  return _Blocks(*floats, mask=without),


_attend.defvjp(_forward, _backward)


def _logits(steps, blocks, i, j):
  # Logits [B,N,R,s,t], -inf where masked, and the slope of the cap.
  products = jnp.einsum('bnrsk,bntk->bnrst', _at(blocks.queries, i), _at(blocks.keys, j),
                        preferred_element_type=accumulator(blocks.queries))
  logits, slope = products * steps.scale, 1.
  if steps.cap is not None:
    bent = jnp.tanh(logits / steps.cap)
    logits, slope = steps.cap * bent, 1 - bent**2
  if blocks.bias is not None:
    logits = logits + jax.lax.dynamic_slice(blocks.bias, *_bias_block(blocks.bias, steps, i, j))
  block = blocks.mask.map(lambda x: _at(x, i), lambda x: _at(x, j))
  seen = block.dense(*steps.size)
  return jnp.where(seen[:, :, None], logits, -jnp.inf), slope


def _bias_block(bias, steps, i, j):
  # Where the block's biases begin, and how many they are.
  s, t = steps.size
  first = jnp.zeros_like(i)
  return (first, first, first, i * s, j * t), (*bias.shape[:3], s, t)


def _add_bias(dbias, dlogits, steps, i, j):
  start, sizes = _bias_block(dbias, steps, i, j)
  shared = tuple(axis for axis in range(3) if dbias.shape[axis] == 1)
  block = jax.lax.dynamic_slice(dbias, start, sizes) + dlogits.sum(axis=shared, keepdims=True)
  return jax.lax.dynamic_update_slice(dbias, block, start)


def _cut(inputs):
  queries, keys, values, bias = inputs.queries, inputs.keys, inputs.values, inputs.bias
  kv_heads, shared = keys.shape[2], queries.shape[2] // keys.shape[2]
  lengths = queries.shape[1], keys.shape[1]
  s, t = size = min(QUERIES, lengths[0]), min(KEYS, lengths[1])
  mask = inputs.mask or Mask()
  steps = _Steps(_pairs(mask, lengths, size), size, inputs.scale, inputs.cap)

  grouped = queries.reshape(*queries.shape[:2], kv_heads, shared, -1)
  if bias is not None:
    heads = (kv_heads, shared) if bias.shape[1] > 1 else (1, 1)
    bias = bias.reshape(bias.shape[0], *heads, *lengths)
    bias = jnp.pad(bias, [(0, 0)] * 3 + [(0, -length % size) for length, size in zip(lengths, size)])
  places = [jnp.arange(length, dtype=jnp.int32)[None] for length in lengths]
  mask = dataclasses.replace(
      mask, query_positions=places[0] if mask.query_positions is None else mask.query_positions,
      key_positions=places[1] if mask.key_positions is None else mask.key_positions)
  # Keys that fill the last block are empty slots; what queries there see is cut off.
  mask = mask.map(lambda x: _blocks(x, s), lambda x: _blocks(x, t, fill=EMPTY if x.dtype != bool else False))
  return steps, _Blocks(
      queries=jnp.moveaxis(_blocks(grouped, s), 2, 4), keys=jnp.moveaxis(_blocks(keys, t), 2, 3),
      values=jnp.moveaxis(_blocks(values, t), 2, 3), bias=bias,
      sinks=None if inputs.sinks is None else inputs.sinks.reshape(kv_heads, shared), mask=mask)


def _blocks(x, size, fill=0):
  # [B,S,...] -> [blocks,B,size,...].
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _pairs(mask, lengths, size):
  # The blocks of queries and keys that may see one another, as far as this is known before any value.
  def may_see(i, j):
    if mask.query_positions is not None or mask.key_positions is not None:
      return True
    behind = (i + 1) * size[0] - 1 - j * size[1]  # from the block's first key to its last query
    ahead = (j + 1) * size[1] - 1 - i * size[0]
    past = not mask.causal or mask.prefix is not None or behind >= 0
    return past and (mask.window is None or max(-behind, -ahead) < mask.window)

  blocks = [range(-(-length // width)) for length, width in zip(lengths, size)]
  return tuple((i, j) for i in blocks[0] for j in blocks[1] if may_see(i, j))


def _scan(step, start, steps):
  pairs = jnp.asarray(steps.pairs, jnp.int32).reshape(-1, 2)
  return jax.lax.scan(step, start, (pairs[:, 0], pairs[:, 1]))[0]


def _at(x, block):
  return jax.lax.dynamic_index_in_dim(x, block, keepdims=False)


def _put(x, new, block):
  return jax.lax.dynamic_update_index_in_dim(x, new, block, axis=0)


def _limit(target, inputs):
  del target
  return DROPS if inputs.drop is not None else None


KERNEL = AttentionKernel(attend, _limit)
