"""Synthetic sources: their claimed properties against Monte Carlo, identities and brute force."""
import itertools

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data import SOURCES


def clusters(**config):
  return SOURCES.build(dict(name='clusters', train_examples=64, test_examples=16, **config), 'source')


def markov(**config):
  return SOURCES.build(dict(name='markov_mixture', **config), 'source')


# clusters

def test_one_linear_expert_per_cluster_solves_the_clusters():
  source = clusters(channels=3)
  examples = source.open('train')
  basis, maps = source.task
  for index, clusters_of_patches in enumerate(source.routing('train')):
    image, scores = examples[index]['image'].astype(np.float64), np.zeros(source.num_classes)
    for patch, cluster in enumerate(clusters_of_patches):
      row, column = divmod(patch, 4)
      pixels = image[4 * row:4 * row + 4, 4 * column:4 * column + 4].ravel()
      coordinates = basis @ (pixels - .5) * 2 * np.sqrt(1 + source.task_dim)
      # The routing can be read off the patch itself: its first coordinates are the one-hot of the cluster.
      np.testing.assert_allclose(coordinates[:8], np.eye(8)[cluster], atol=1e-5)  # float32 pixels
      scores += maps[cluster] @ coordinates[8:16]
    assert scores.argmax() == examples[index]['label']


def test_one_linear_map_for_all_clusters_does_not_solve_the_clusters():
  source = SOURCES.build(dict(name='clusters', train_examples=2000, test_examples=1000), 'source')
  features, labels = {}, {}
  for split in source.splits:
    examples = source.open(split)
    features[split] = np.stack([examples[index]['image'].ravel() for index in range(len(examples))])
    labels[split] = np.array([examples[index]['label'] for index in range(len(examples))])
  inputs = np.c_[features['train'] - .5, np.ones(2000)]
  weights = np.linalg.lstsq(inputs, np.eye(10)[labels['train']], rcond=None)[0]
  accuracy = (np.c_[features['test'] - .5, np.ones(1000)] @ weights).argmax(-1) == labels['test']
  assert accuracy.mean() < 0.3


def test_clusters_are_images_in_0_to_1_with_all_labels_and_disjoint_splits():
  source = clusters()
  train, test = ([source.open(split)[i] for i in range(16)] for split in ('train', 'test'))
  assert all(0 <= example['image'].min() and example['image'].max() <= 1 for example in train)
  assert len({int(source.open('train')[i]['label']) for i in range(64)}) > 5
  assert not any(np.array_equal(a['image'], b['image']) for a, b in itertools.product(train, test))


def test_clusters_that_do_not_fit_a_patch_are_refused():
  with pytest.raises(ConfigError, match='num_clusters [+] task_dim = 17 exceeds the 16 values of a patch'):
    clusters(num_clusters=9)
  with pytest.raises(ConfigError, match='image_size must be a multiple of patch_size 4, not 18'):
    clusters(image_size=18)


# markov_mixture

def test_the_entropy_of_a_chain_worked_out_by_hand():
  source = markov(num_components=2, num_ids=2)
  # Chain 0 stays with 3/4; chain 1 is a fair coin. Both are symmetric, so each id has probability 1/2. The entropy
  # rates are H(1/4) = 2 - (3/4) log2 3 = 0.811278 and 1.
  source.__dict__['transitions'] = np.array([[[.75, .25], [.25, .75]], [[.5, .5], [.5, .5]]])
  np.testing.assert_allclose(source.stationary, .5, rtol=1e-12)
  assert source.component_bits == pytest.approx((2 - .75 * np.log2(3) + 1) / 2, rel=1e-12)
  # Without the component the next id repeats with (3/4 + 1/2) / 2 = 5/8: H(5/8) = 3 - (5/8) log2 5 - (3/8) log2 3.
  assert source.bigram_bits == pytest.approx(3 - 5 / 8 * np.log2(5) - 3 / 8 * np.log2(3), rel=1e-12)


def test_equilibria_are_stationary():
  source = markov()
  np.testing.assert_allclose(source.stationary.sum(-1), 1, rtol=1e-12)
  np.testing.assert_allclose(np.einsum('zi,zij->zj', source.stationary, source.transitions), source.stationary,
                             atol=1e-14)
  # Power iteration from another start converges to it too.
  np.testing.assert_allclose(np.linalg.matrix_power(source.transitions[1], 4096)[0], source.stationary[1], atol=1e-12)


def test_sampled_documents_cost_the_exact_entropies():
  source = markov(test_documents=2000, document_length=129)
  examples, component = source.open('test'), source.routing('test')
  tokens = np.stack([examples[index]['tokens'] for index in range(2000)])
  before, after = tokens[:, :-1], tokens[:, 1:]
  known = -np.log2(source.transitions[component[:, None], before, after]).mean(-1)
  mixture = np.einsum('zi,zij->ij', source.stationary, source.transitions) / source.stationary.sum(0)[:, None]
  unknown = -np.log2(mixture[before, after]).mean(-1)
  for bits, exact in ((known, source.component_bits), (unknown, source.bigram_bits)):
    # Five standard errors of the mean over independent documents.
    assert abs(bits.mean() - exact) < 5 * bits.std() / np.sqrt(2000)
  assert source.component_bits < source.bigram_bits - 0.3


def test_optimal_bits_follow_bayes_rule_step_by_step():
  source = markov(num_components=3, num_ids=4)
  tokens = np.array([[0, 3, 3, 1, 2], [2, 2, 2, 2, 2]])
  for document, bits in zip(tokens, source.optimal_bits(tokens)):
    belief, expected = np.full(3, 1 / 3), 0.
    for position, token in enumerate(document):
      likelihood = source.transitions[:, document[position - 1], token] if position else source.stationary[:, token]
      expected -= np.log2(belief @ likelihood)
      belief = belief * likelihood / (belief @ likelihood)
    assert bits == pytest.approx(expected, rel=1e-12)


def test_optimal_bits_of_all_documents_are_a_probability_distribution():
  source = markov(num_components=2, num_ids=3)
  everything = np.array(list(itertools.product(range(3), repeat=4)))
  assert (2. ** -source.optimal_bits(everything)).sum() == pytest.approx(1, rel=1e-12)


def test_documents_reveal_their_component():
  source = markov(test_documents=200, document_length=64)
  examples = source.open('test')
  tokens = np.stack([examples[index]['tokens'] for index in range(200)])
  likelihood = np.log2(source.transitions[:, tokens[:, :-1], tokens[:, 1:]]).sum(-1)
  assert (likelihood.argmax(0) == source.routing('test')).mean() > .99
