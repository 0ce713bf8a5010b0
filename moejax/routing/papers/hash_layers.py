"""Hash Layers: fixed experts for every token id."""
from collections.abc import Sequence
from typing import Any, Literal

from moejax.routing.hashing import HashTable
from moejax.routing.papers import paper

Hashed = Literal['token_ids', 'bigrams', 'previous_ids', 'positions', 'next_ids']


@paper('Hash Layers For Large Sparse Models', '2106.04426', chooses='fixed', exchangeable=False,
       example=dict(vocab_size=11), alone=dict(vocab_size=11))
def hash_layers(vocab_size: int, table: HashTable | tuple[int, ...] = 'random',
                frequencies: Sequence[float] | None = None, of: Hashed = 'token_ids') -> dict[str, Any]:
  """Hash Layers For Large Sparse Models (arXiv 2106.04426).

  Section 3: the expert is a fixed hash of the input token's id and its output has weight one, so there is nothing to
  learn or to balance. Section 3.1: the table is random (seed 42, as in ParlAI, whose generator makes another table of
  it), or balanced over the training data's token `frequencies`, or given: `hashing.clustered_table`,
  `hashing.dispersed_table` of embeddings; 'modulo' is the HASH of 'Unified Scaling Laws for Routed Language Models'
  (2202.01169). What is hashed is the token's id, that of the token before, a bigram of both, the position (`vocab_size`
  is then how many there are), or, as an oracle that no model can use, the id of the token after.
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
  """MultiHash layers (arXiv 2106.04426, section 3.2): one expert of each of several hash functions.

  Segment n of both matrices of the feed-forward is that of the n-th expert: use experts `segments`, dispatch
  `segments`.
  """
  return dict(
      features=dict(name='token_ids'),
      score=dict(name='hash', vocab_size=vocab_size, table=table, seed=42, hashes=hashes),
      select=dict(name='hashed', k=hashes),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
