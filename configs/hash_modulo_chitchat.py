"""HASH of the scaling laws as a decoder on dialogues: the expert is the byte modulo the number of experts.

System: HASH
Paper: Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv 2202.01169), section 3.2.3; after
  Roller et al. 2021 (arXiv 2106.04426), whose table is random.
Command: python -m moejax.train --config=configs/hash_modulo_chitchat.py --workdir=runs/hash_modulo_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: as configs/hash_chitchat.py.
Proof: numbers: tests/routing/score/test_hashing.py::test_a_modulo_table_is_the_id_modulo_e
Differs: nothing known.
"""
from configs import hash_chitchat
from moejax.routing import papers


def get_config():
  config = hash_chitchat.get_config()
  config.model.moe.router = papers.hash_layers(vocab_size=config.model.vocab_size, table='modulo')
  return config
