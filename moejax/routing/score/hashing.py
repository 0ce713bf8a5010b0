"""Routers without parameters: fixed experts for every token id (Hash Layers, arXiv 2106.04426)."""
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from moejax.config import ConfigError
from moejax.ranges import Count, Natural, NonNegative
from moejax.routing.stages import SCORES, Score, Scores, noiseless

HashTable = Literal['random', 'balanced', 'modulo']


@functools.lru_cache(maxsize=64)
def hash_table(table: HashTable, vocab_size: int, num_experts: int, seed: int = 0,
               frequencies: tuple[float, ...] | None = None) -> np.ndarray:
  """The expert of every token id (Hash Layers, section 3.1; 'modulo' is from 'Unified scaling laws').

  Args:
    table: 'random': drawn independently for every id; 'balanced': ids, most frequent first, go to the expert with the
      smallest total frequency so far; 'modulo': the id modulo E.
    vocab_size: V.
    num_experts: E.
    seed: for 'random', and for the order of equally frequent ids in 'balanced'.
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
  """The cluster of every token id among E clusters of embeddings: similar words share an expert (section 3.1).

  Args:
    embeddings: <float>[V,..], e.g. of a trained dense model.
    num_experts: E.
    seed: for k-means.

  Returns:
    V experts, for `table` of score 'hash'.
  """
  return tuple(_clusters(embeddings, num_experts, seed).tolist())


def dispersed_table(embeddings: np.ndarray, num_experts: int, seed: int = 0) -> tuple[int, ...]:
  """The opposite of `clustered_table`: each cluster is spread over all experts, which separates similar words.

  Experts get the same number of ids, give or take one, of each cluster and in total.
  """
  shuffled = np.random.default_rng(seed).permutation(len(embeddings))
  by_cluster = shuffled[np.argsort(_clusters(embeddings, num_experts, seed)[shuffled], kind='stable')]
  table = np.zeros(len(embeddings), int)
  table[by_cluster] = np.arange(len(embeddings)) % num_experts
  return tuple(table.tolist())


def _clusters(embeddings, count, seed):
  from sklearn.cluster import KMeans  # only needed to make a table
  n_init: Any = 4  # annotated as a string in scikit-learn
  return KMeans(count, n_init=n_init, random_state=seed).fit_predict(np.asarray(embeddings, float))


@SCORES('hash')
class Hash(Score):
  """Fixed experts for every token id; no parameters (Hash Layers, section 3).

  Config:
    table: kind of table, or V experts as made by `clustered_table` and `dispersed_table`.
    hashes: N, number of tables, with seeds from `seed` on (MultiHash layers, section 3.2). Their experts are in
      `extras`: `experts` <int32>[G,S,N].
    vocab_size: V, vocabulary size of the tokenizer.
    seed: seed of the first table.
    frequencies: V counts for the table 'balanced'; None: all ids equally frequent.
  """

  gives = ('experts',)

  def __init__(self, *, dim: int | None, num_experts: int, vocab_size: Count,
               table: HashTable | tuple[Natural, ...] = 'random', seed: Natural = 0,
               frequencies: tuple[NonNegative, ...] | None = None, hashes: Count = 1):
    if dim is not None:
      raise ConfigError(": 'hash' needs token ids. Set features=dict(name='token_ids').")
    if frequencies is not None and (table != 'balanced' or len(frequencies) != vocab_size):
      raise ConfigError(f".frequencies is only for table='balanced', with one for each of the {vocab_size} ids; "
                        f'got {len(frequencies)} for table={table!r}.')
    self.num_experts = num_experts
    if isinstance(table, str):
      if hashes > 1 and table == 'modulo':
        raise ConfigError(f".hashes is {hashes}, but with table='modulo' all hashes are equal. Set it to 1.")
      frequencies = None if frequencies is None else tuple(frequencies)
      tables = [hash_table(table, vocab_size, num_experts, seed + n, frequencies) for n in range(hashes)]
    else:
      if len(table) != vocab_size or not all(0 <= expert < num_experts for expert in table) or hashes != 1:
        raise ConfigError(f'.table must have an expert below {num_experts} for each of the {vocab_size} ids, '
                          f'with hashes=1; got {len(table)} entries and hashes={hashes}.')
      tables = [table]
    self.tables = tuple(tuple(int(expert) for expert in table) for table in tables)  # static: part of the program

  def __call__(self, features: Int[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <int32>[G,S] below V. The logits are the log of a mean of one-hots, with log 0 made finite."""
    experts = jnp.asarray(np.array(self.tables, np.int32).T)[features]
    share = jnp.mean((experts[..., None] == jnp.arange(self.num_experts)).astype(jnp.float32), axis=2)
    return noiseless(jnp.where(share > 0, jnp.log(share), jnp.finfo(jnp.float32).min), dict(experts=experts))
