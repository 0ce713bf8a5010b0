"""Hash Layers: a fixed expert for every token id."""
from collections.abc import Sequence
from typing import Any, Literal

from moejax.routing.papers import paper
from moejax.routing.score.hashing import HashTable

Hashed = Literal['token_ids', 'bigrams', 'previous_ids', 'positions', 'next_ids']


@paper('Hash Layers For Large Sparse Models', '2106.04426', chooses='fixed', exchangeable=False,
       example=dict(vocab_size=11), alone=dict(vocab_size=11))
def hash_layers(vocab_size: int, table: HashTable | tuple[int, ...] = 'random',
                frequencies: Sequence[float] | None = None, of: Hashed = 'token_ids') -> dict[str, Any]:
  """Hash Layers For Large Sparse Models (arXiv 2106.04426).

  Section 3: the expert is a fixed hash of the input token's id and its output has weight one, so routing is neither
  learned nor balanced. Section 3.1: the table is random (seed 42, as in ParlAI, whose generator makes a different
  table), or balanced over the training data's token `frequencies`, or given: `hashing.clustered_table`,
  `hashing.dispersed_table` of embeddings; 'modulo' is the HASH of 'Unified Scaling Laws for Routed Language Models'
  (2202.01169). `of`: the hashed id is the token's, the previous token's, a bigram of both, the position (`vocab_size`
  is then the number of positions), or, as an oracle, the next token's.
  """
  features = dict(name=of, buckets=vocab_size) if of == 'bigrams' else dict(name=of)
  return dict(
      features=features,
      score=dict(name='hash', vocab_size=vocab_size, table=table, seed=42, frequencies=frequencies),
      select=dict(name='top_k', k=1),
      weigh=dict(name='one'),
      place=dict(name='dropless'))


@paper('Hash Layers For Large Sparse Models', '2106.04426', chooses='fixed', exchangeable=False,
       example=dict(vocab_size=11), alone=dict(vocab_size=11, hashes=1))
def multi_hash(vocab_size: int, hashes: int = 2, table: HashTable = 'random') -> dict[str, Any]:
  """MultiHash layers (arXiv 2106.04426, section 3.2): one expert per hash function.

  Segment n of both matrices of the feed-forward comes from the n-th expert: use experts `segments`, dispatch
  `segments`.
  """
  return dict(
      features=dict(name='token_ids'),
      score=dict(name='hash', vocab_size=vocab_size, table=table, seed=42, hashes=hashes),
      select=dict(name='hashed', k=hashes),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
