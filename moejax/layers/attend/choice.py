"""Attention by the implementation that the caller names, or the best that can run here."""
import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.kernels.choice import CannotRun
from moejax.kernels.target import target
from moejax.layers.attend.inputs import AttentionInputs, AttentionKernel, Mask

Name = Literal['plain', 'chunked', 'cudnn', 'splash', 'tokamax']

REASONS: dict[Name, str] = {
    'plain': 'all logits in memory, [B,H,S,T] of them; the fastest for short sequences, with dropout too',
    'chunked': 'blocks of queries and keys in turn, in plain JAX: memory grows with S + T; runs anywhere',
    'cudnn': "cuDNN's fused kernel for NVIDIA GPUs; segments become a bias of [B,1,S,T]",
    'splash': "JAX's fused kernel for TPU, which skips blocks that causal attention and windows forbid",
    'tokamax': "tokamax's attention, with the kernel it picks; for comparison",
}
# The fastest on each platform, where they can run.
FUSED: dict[str, tuple[Name, ...]] = {'cpu': (), 'gpu': ('cudnn',), 'tpu': ('splash',)}
# Up to this many queries and keys all logits are in memory: 4 MiB for a head.
SHORT = 1024

assert set(REASONS) == set(get_args(Name))


def attend(queries: Float[Array, 'B S H k'], keys: Float[Array, 'B T N k'], values: Float[Array, 'B T N v'], *,
           scale: float, mask: Mask | None = None, bias: Float[Array, '#B #H S T'] | None = None,
           sinks: Float[Array, 'H'] | None = None, cap: float | None = None,
           drop: Callable[[jax.Array], jax.Array] | None = None,
           implementation: Name | None = None) -> Float[Array, 'B S H v']:
  """Softmax attention: softmax(bias + capped(scale * queries . keys)) . values, over the keys that the mask allows.

  Logits and weights are float32. A query that sees no key attends to all keys equally, to avoid NaN; with sinks, to
  none: its output is 0.

  Args:
    queries: <float>[B,S,H,k].
    keys: <float>[B,T,N,k], where N divides H: head h reads head h // (H/N) (2305.13245).
    values: <float>[B,T,N,v].
    scale: factor of the logits.
    mask: which keys a query sees; None: all.
    bias: <float>[B|1,1|H,S,T], added to the logits after the cap.
    sinks: <float32>[H], for each head a further logit without a value, which takes its share of the weights
      (gpt-oss; 2309.17453 equation 2 has it at 0).
    cap: logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118 section 2); None: no cap.
    drop: <float32>[B,H,S,T] -> the same, applied to the weights (dropout); by 'plain' only.
    implementation: see `choice.REASONS`; None: by platform and sizes (see `explain`).

  Returns:
    <float>[B,S,H,v] of the dtype of the values.

  Raises:
    ValueError: shapes do not fit together, or the implementation is unknown.
    CannotRun: the implementation cannot run these inputs here (also a ValueError).
  """
  inputs = AttentionInputs(queries, keys, values, scale, mask, bias, sinks, cap, drop)
  _check(inputs)
  return choose(implementation, inputs).run(inputs)


def explain(queries: Any, keys: Any, values: Any, *, implementation: Name | None = None, **others: Any) -> str:
  """Explains in a few lines which implementation `attend` uses here for these arguments, and why not the others.

  Takes the arguments of `attend`, or `jax.ShapeDtypeStruct`s in place of arrays.
  """
  inputs = AttentionInputs(queries, keys, values, **{'scale': 1., **others})
  where = target()
  chosen = implementation or default(inputs)
  lines = [f'On {where.platform} ({where.kind}):']
  for name, reason in REASONS.items():
    limit = kernel(name).limit(where, inputs)
    verb = 'cannot run' if limit else 'runs' if name == chosen else 'could run'
    lines.append(f'  {name}: {verb}: {limit or reason}')
  return '\n'.join(lines)


def choose(name: Name | None, inputs: AttentionInputs) -> AttentionKernel:
  """The implementation `name`, or by default the best that runs the inputs on the current target.

  Raises:
    CannotRun: the requested implementation cannot run them.
  """
  chosen = kernel(name or default(inputs))
  if limit := chosen.limit(target(), inputs):
    raise CannotRun(f'{name}: {limit}')
  return chosen


def default(inputs: AttentionInputs) -> Name:
  """The best implementation that runs the inputs on the current target."""
  where = target()
  short = inputs.queries.shape[1] * inputs.keys.shape[1] <= SHORT**2
  ranked: tuple[Name, ...] = (*FUSED[where.platform], 'plain' if short else 'chunked')
  for name in ranked:
    if not kernel(name).limit(where, inputs):
      return name
  return 'plain'


def kernel(name: Name) -> AttentionKernel:
  """The implementation called `name`. Raises ValueError if there is no such name."""
  if name not in REASONS:
    raise ValueError(f'Unknown implementation {name!r} of attention. Allowed: {", ".join(sorted(REASONS))}.')
  return importlib.import_module(f'moejax.layers.attend.{name}').KERNEL


def _check(inputs):
  queries, keys, values = inputs.queries, inputs.keys, inputs.values
  shapes = f'not queries {queries.shape}, keys {keys.shape} and values {values.shape}.'
  if not queries.ndim == keys.ndim == values.ndim == 4:
    raise ValueError(f'attend needs queries [B,S,H,k], keys [B,T,N,k] and values [B,T,N,v], {shapes}')
  batch, length, heads, width = queries.shape
  kv_length, kv_heads = keys.shape[1:3]
  if keys.shape != (batch, kv_length, kv_heads, width) or values.shape[:3] != keys.shape[:3] or heads % kv_heads:
    raise ValueError('attend needs queries [B,S,H,k], keys [B,T,N,k] and values [B,T,N,v] where N divides H, '
                     f'{shapes}')
  _check_shape('bias', inputs.bias, [(1, batch), (1, heads), (length,), (kv_length,)])
  _check_shape('sinks', inputs.sinks, [(heads,)])
  mask = inputs.mask or Mask()
  _check_shape('mask.query_segments', mask.query_segments, [(batch,), (length,)])
  _check_shape('mask.key_segments', mask.key_segments, [(batch,), (kv_length,)])
  _check_shape('mask.query_positions', mask.query_positions, [(1, batch), (length,)])
  _check_shape('mask.key_positions', mask.key_positions, [(1, batch), (kv_length,)])
  _check_shape('mask.prefix', mask.prefix, [(batch,), (kv_length,)])


def _check_shape(name, array, allowed):
  if array is None:
    return
  shape = jnp.shape(array)
  if len(shape) != len(allowed) or any(size not in sizes for size, sizes in zip(shape, allowed)):
    spelled = ','.join('|'.join(map(str, dict.fromkeys(sizes))) for sizes in allowed)
    raise ValueError(f'attend needs {name} [{spelled}] beside these queries and keys, not {list(shape)}.')
