"""MultiHash layers on dialogues: each half of a byte's feed-forward is chosen by a different hash of the byte.

System: MultiHash layers
Paper: Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv 2106.04426), section 3.2: two hash functions
  over 8 experts make up to 64 feed-forwards.
Command: python -m moejax.train --config=configs/multi_hash_chitchat.py --workdir=runs/multi_hash_chitchat
Cost: about three minutes on 2 CPU cores.
Result: Expected: as configs/hash_chitchat.py.
Proof: numbers: tests/layers/test_multi_hash.py::test_equals_the_loop_over_tokens,
  tests/layers/test_multi_hash.py::test_one_hash_is_a_plain_hash_layer
Differs: nothing known; no code is published. The split of the output matrix (by outputs, each from the whole hidden
  layer) is from memory of the paper's equations.
"""
from configs import hash_chitchat
from moejax.routing import papers


def get_config():
  config = hash_chitchat.get_config()
  hashes = 2
  config.model.moe.experts = dict(name='segments', segments=hashes, hidden=384, activation='swiglu')
  config.model.moe.router = papers.multi_hash(vocab_size=config.model.vocab_size, hashes=hashes)
  config.model.moe.dispatch.name = 'segments'
  return config
