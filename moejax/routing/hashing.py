"""Routers without anything to learn: a fixed expert for every token id (Hash Layers, arXiv 2106.04426)."""
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError
from moejax.routing.scores import SCORES, Score, Scores, noiseless

HashTable = Literal['random', 'balanced', 'modulo']


@functools.lru_cache(maxsize=64)
def hash_table(table: HashTable, vocab_size: int, num_experts: int, seed: int = 0,
               frequencies: tuple[float, ...] | None = None) -> np.ndarray:
  """The expert of every token id (Hash Layers, section 3.1; 'modulo' is that of 'Unified scaling laws').

  Args:
    table: 'random' draws every expert independently; 'balanced' gives the ids, most frequent first, each to the expert
      with the least mass so far; 'modulo' is the id modulo E.
    vocab_size: V.
    num_experts: E.
    seed: of 'random', and of the order among equally frequent ids of 'balanced'.
    frequencies: V counts for 'balanced'; None: all ids equally frequent.

  Returns:
    <int32>[V].
  """
  if table == 'modulo':
    return np.arange(vocab_size, dtype=np.int32) % num_experts
  generator = np.random.default_rng(seed)
  if table == 'random':
    return generator.integers(num_experts, size=vocab_size, dtype=np.int32)
  mass = np.ones(vocab_size) if frequencies is None else np.asarray(frequencies, float)
  shuffled = generator.permutation(vocab_size)
  experts, load = np.zeros(vocab_size, np.int32), np.zeros(num_experts)
  for token in shuffled[np.argsort(-mass[shuffled], kind='stable')]:
    experts[token] = np.argmin(load)
    load[experts[token]] += mass[token]
  return experts


@SCORES('hash')
class Hash(Score):
  """A fixed expert for every token id; nothing to learn (Hash Layers, section 3). See `hash_table` for the keys."""

  def __init__(self, *, where: str, dim: int | None, num_experts: int, vocab_size: int, table: HashTable = 'random',
               seed: int = 0, frequencies: Sequence[float] | None = None):
    if dim is not None:
      raise ConfigError(f"{where}: 'hash' looks at token ids. Set features=dict(name='token_ids').")
    if frequencies is not None and (table != 'balanced' or len(frequencies) != vocab_size):
      raise ConfigError(f"{where}.frequencies are for table='balanced', one for each of the {vocab_size} ids; "
                        f'here are {len(frequencies)} for table={table!r}.')
    self.num_experts = num_experts
    self.arguments = (table, vocab_size, num_experts, seed, None if frequencies is None else tuple(frequencies))

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <int32>[G,S] below V. The logits are a finite stand-in for the log of a one-hot."""
    expert = jnp.asarray(hash_table(*self.arguments))[features]
    one_hot = expert[..., None] == jnp.arange(self.num_experts)
    return noiseless(jnp.where(one_hot, 0., jnp.finfo(jnp.float32).min))
