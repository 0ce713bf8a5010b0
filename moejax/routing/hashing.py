"""Routers without anything to learn: fixed experts for every token id (Hash Layers, arXiv 2106.04426)."""
import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError
from moejax.ranges import Count, Natural, NonNegative
from moejax.routing.features import FEATURES, RouterInputs
from moejax.routing.plans import Leak, Plan, token_plan
from moejax.routing.scores import SCORES, Score, Scores, noiseless
from moejax.routing.selection import SELECTIONS

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


def clustered_table(embeddings: np.ndarray, num_experts: int, seed: int = 0) -> tuple[int, ...]:
  """The cluster of every token id among E clusters of their embeddings: like words share an expert (section 3.1).

  Args:
    embeddings: <float>[V,..] e.g. those of a trained dense model.
    num_experts: E.
    seed: of k-means.

  Returns:
    V experts, for `table` of score 'hash'.
  """
  return tuple(_clusters(embeddings, num_experts, seed).tolist())


def dispersed_table(embeddings: np.ndarray, num_experts: int, seed: int = 0) -> tuple[int, ...]:
  """`clustered_table` the other way round: each cluster is dealt out to all experts, so that like words part.

  Experts get equally many ids of each cluster, give or take one, and of all clusters together.
  """
  shuffled = np.random.default_rng(seed).permutation(len(embeddings))
  by_cluster = shuffled[np.argsort(_clusters(embeddings, num_experts, seed)[shuffled], kind='stable')]
  table = np.zeros(len(embeddings), int)
  table[by_cluster] = np.arange(len(embeddings)) % num_experts
  return tuple(table.tolist())


def _clusters(embeddings, count, seed):
  from sklearn.cluster import KMeans  # needed by whoever makes a table, by no one who reads it
  return KMeans(count, n_init=4, random_state=seed).fit_predict(np.asarray(embeddings, float))


def pair_hash(first: jax.Array, second: jax.Array, buckets: int) -> jax.Array:
  """<int32> of the same shape below `buckets`: as good as random in the pair, and the same everywhere and always.

  Multiplications and shifts of 32 bits (the finaliser of MurmurHash3), once for each of the pair.
  """
  def mix(h):
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
  h = mix(mix(first.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)) + second.astype(jnp.uint32))
  return (h % jnp.uint32(buckets)).astype(jnp.int32)


@FEATURES('bigrams')
class Bigrams:
  """A hash below `buckets` of the token's id and the one before it.

  Config:
    buckets: how many values the hash has.
  """

  width: ClassVar[None] = None

  def __init__(self, *, buckets: Count):
    self.buckets = buckets

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """-> <int32>[G,S]. Raises ValueError where the model supplies no ids."""
    return pair_hash(inputs['previous_ids'], inputs['token_ids'], self.buckets)


@SCORES('hash')
class Hash(Score):
  """Fixed experts for every token id; nothing to learn (Hash Layers, section 3).

  Config:
    table: of a kind, or V experts, as `clustered_table` and `dispersed_table` make them.
    hashes: N tables, of the seeds from `seed` on (MultiHash layers, section 3.2). What each says is in the `extras`:
      `experts` <int32>[G,S,N].
    vocab_size: V, ids of the tokenizer.
    seed: of tables that are drawn.
    frequencies: V counts for the table 'balanced'; None: all ids equally frequent.
  """

  gives = ('experts',)

  def __init__(self, *, where: str, dim: int | None, num_experts: int, vocab_size: Count,
               table: HashTable | tuple[Natural, ...] = 'random', seed: Natural = 0,
               frequencies: tuple[NonNegative, ...] | None = None, hashes: Count = 1):
    if dim is not None:
      raise ConfigError(f"{where}: 'hash' looks at token ids. Set features=dict(name='token_ids').")
    if frequencies is not None and (table != 'balanced' or len(frequencies) != vocab_size):
      raise ConfigError(f"{where}.frequencies are for table='balanced', one for each of the {vocab_size} ids; "
                        f'here are {len(frequencies)} for table={table!r}.')
    self.num_experts = num_experts
    if isinstance(table, str):
      if hashes > 1 and table == 'modulo':
        raise ConfigError(f"{where}.hashes is {hashes}: with table='modulo' all would be the same. Set 1.")
      frequencies = None if frequencies is None else tuple(frequencies)
      tables = [hash_table(table, vocab_size, num_experts, seed + n, frequencies) for n in range(hashes)]
    else:
      if len(table) != vocab_size or not all(0 <= expert < num_experts for expert in table) or hashes != 1:
        raise ConfigError(f'{where}.table must name an expert below {num_experts} for each of the {vocab_size} ids, '
                          f'and be the only one (hashes=1); here are {len(table)} for {hashes} hashes.')
      tables = [table]
    self.tables = tuple(tuple(int(expert) for expert in table) for table in tables)  # static: part of the program

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <int32>[G,S] below V. The logits are a finite stand-in for the log of a mean of one-hots."""
    experts = jnp.asarray(np.array(self.tables, np.int32).T)[features]
    share = jnp.mean((experts[..., None] == jnp.arange(self.num_experts)).astype(jnp.float32), axis=2)
    return noiseless(jnp.where(share > 0, jnp.log(share), jnp.finfo(jnp.float32).min), dict(experts=experts))


@SELECTIONS('hashed')
@dataclasses.dataclass(frozen=True)
class Hashed:
  """Choice n of a token is what hash n of score 'hash' says, be it the same expert as another's.

  Config:
    k: hashes, N.
  """
  where: str
  num_experts: int
  k: Count

  reads_slots: ClassVar[bool] = False
  reads: ClassVar[tuple[str, ...]] = ('experts',)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    experts = scores.extras['experts']
    if experts.shape[-1] != self.k:
      raise ConfigError(f"{self.where}.k = {self.k} needs score=dict(name='hash', hashes={self.k}, ...).")
    return token_plan(experts, valid[..., None], self.num_experts)
