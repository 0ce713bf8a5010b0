"""Hash Layers: a fixed expert for every token id."""
from collections.abc import Sequence
from typing import Any

from moejax.routing.hashing import HashTable
from moejax.routing.papers import paper


@paper('Hash Layers For Large Sparse Models', '2106.04426', chooses='fixed', exchangeable=False,
       example=dict(vocab_size=11), alone=dict(vocab_size=11))
def hash_layers(vocab_size: int, table: HashTable = 'random',
                frequencies: Sequence[float] | None = None) -> dict[str, Any]:
  """Hash Layers For Large Sparse Models (arXiv 2106.04426).

  Section 3: the expert is a fixed hash of the input token's id and its output has weight one, so there is nothing to
  learn or to balance. Section 3.1: the table is random (as in ParlAI, with seed 42), or balanced over the training
  data's token `frequencies`; 'modulo' is the HASH of 'Unified Scaling Laws for Routed Language Models' (2202.01169).
  """
  return dict(
      features=dict(name='token_ids'),
      score=dict(name='hash', vocab_size=vocab_size, table=table, seed=42, frequencies=frequencies),
      select=dict(name='top_k', k=1),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
