"""Hash layers on dialogues, at the active compute of configs/dense_chitchat.py: the expert is a hash of the byte.

System: Hash layers
Paper: Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv 2106.04426): routing without learning or
  balancing. Variants are those of section 5: other tables of the byte, made from the training data, and hashes of
  something else; 'future' sees the target.
Command: python -m moejax.train --config=configs/hash_chitchat.py --workdir=runs/hash_chitchat
Cost: about three minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
Proof: identities: tests/routing/papers/test_hash_layers.py::test_routes_depend_on_neither_parameters_nor_steps_nor_keys,
  tests/routing/papers/test_hash_layers.py::test_a_hash_layer_is_a_feed_forward_for_each_part_of_the_vocabulary
Differs: ParlAI's code has only the random table, with the same seed but another generator; the other tables are from
  memory of the paper. Its experts have xavier-uniform initialisation, biases and ReLU; here SwiGLU without biases.
"""
import numpy as np

from configs import switch_chitchat
from moejax import data
from moejax.routing import papers
from moejax.routing.score import hashing

VARIANTS = ('random', 'balanced', 'bigrams', 'previous', 'positions', 'future', 'clustered', 'dispersed')


def get_config(variant='random'):
  config = switch_chitchat.get_config()
  config.model.moe.router = router(variant, config)
  config.model.moe.dispatch.name = 'grouped'
  config.model.moe.group = 'batch'
  config.model.moe.experts.init_scale = 1.0
  if variant == 'future':
    config.model.routing_leak = 'oracle'
  return config


def router(variant, config):
  """The router of a variant: the hashed feature, and the table."""
  vocab_size, num_experts = config.model.vocab_size, config.model.moe.num_experts
  features = dict(bigrams='bigrams', previous='previous_ids', positions='positions', future='next_ids')
  if variant in features:
    values = dict(bigrams=2**16, positions=config.data.length).get(variant, vocab_size)
    return papers.hash_layers(values, of=features[variant])
  if variant == 'random':
    return papers.hash_layers(vocab_size)
  counts = following(config)
  if variant == 'balanced':
    return papers.hash_layers(vocab_size, 'balanced', frequencies=tuple(counts.sum(1).tolist()))
  # Stands in for a trained model's embeddings: frequencies of following bytes, on a scale where rare ones count.
  embeddings = np.log1p(counts)
  make = dict(clustered=hashing.clustered_table, dispersed=hashing.dispersed_table)[variant]
  return papers.hash_layers(vocab_size, make(embeddings, num_experts))


def following(config):
  """<float>[V,V] how often each byte is followed by each, in the first batches of the training data."""
  batches = iter(data.build(config.data, 'config.data').train(0))
  counts = np.zeros((config.model.vocab_size,) * 2)
  for _, batch in zip(range(100), batches):
    np.add.at(counts, (batch['tokens'], batch['targets']), batch['loss_mask'])
  return counts
