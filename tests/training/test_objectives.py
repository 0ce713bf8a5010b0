"""Objectives against float64 loops over single examples, written from the definitions."""
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.training import objectives

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 5))
TEXT_LOGITS = RNG.normal(size=(2, 3, 5))


def output(logits, routers=None):
  return types.SimpleNamespace(logits=jnp.asarray(logits, jnp.float32), routers=routers or {})


def build(**config):
  return objectives.build(config, 'config.objective')


def log_softmax(row):
  return row - math.log(sum(math.exp(x) for x in row))


def test_classification_is_the_mean_cross_entropy_of_valid_examples():
  label, valid = np.array([1, 0, 4, 2]), np.array([True, True, False, True])
  loss, metrics = build(name='classification')(output(LOGITS), dict(label=label, valid=valid))
  rows = [0, 1, 3]
  expected = np.mean([-log_softmax(LOGITS[i])[label[i]] for i in rows])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics['accuracy'], np.mean([LOGITS[i].argmax() == label[i] for i in rows]), rtol=1e-6)


def test_label_smoothing_mixes_the_target_with_the_uniform_distribution():
  label, valid = np.array([1, 0, 4, 2]), np.ones(4, bool)
  loss, _ = build(name='classification', label_smoothing=0.2)(output(LOGITS), dict(label=label, valid=valid))
  rows = [0.8 * -log_softmax(row)[y] + 0.2 / 5 * sum(-log_softmax(row)) for row, y in zip(LOGITS, label)]
  np.testing.assert_allclose(loss, np.mean(rows), rtol=1e-6)


def test_sigmoid_sums_one_binary_cross_entropy_per_class():
  labels, valid = (RNG.random((4, 5)) < 0.4).astype(np.float32), np.array([True, False, True, True])
  loss, _ = build(name='classification', loss='sigmoid')(output(LOGITS), dict(labels=labels, valid=valid))
  p = 1 / (1 + np.exp(-LOGITS))
  rows = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1)
  np.testing.assert_allclose(loss, rows[valid].mean(), rtol=1e-6)


@pytest.mark.parametrize('name, key', [('language_model', 'targets'), ('seq2seq', 'decoder_targets')])
def test_text_is_scored_where_the_mask_counts_it(name, key):
  targets, mask = RNG.integers(5, size=(2, 3)), np.array([[1., 1., 0.], [1., 0., 0.]])
  loss, metrics = build(name=name, z_loss=0.1)(output(TEXT_LOGITS), {key: targets, 'loss_mask': mask})
  counted = [(0, 0), (0, 1), (1, 0)]
  entropy = np.mean([-log_softmax(TEXT_LOGITS[i])[targets[i]] for i in counted])
  z_loss = np.mean([math.log(np.exp(TEXT_LOGITS[i]).sum())**2 for i in counted])
  np.testing.assert_allclose(metrics['cross_entropy'], entropy, rtol=1e-6)
  np.testing.assert_allclose(loss, entropy + 0.1 * z_loss, rtol=1e-6)


def test_a_batch_of_padding_alone_has_loss_zero():
  loss, _ = build(name='classification')(output(LOGITS), dict(label=np.zeros(4, int), valid=np.zeros(4, bool)))
  assert loss == 0


@pytest.mark.parametrize('how, expected', [('sum', 1 + 2 + 4), ('mean', (1 + 2 + 4) / 2)])
def test_router_losses_are_summed_or_averaged_over_layers(how, expected):
  routers = {'block_01': types.SimpleNamespace(losses=dict(importance=jnp.float32(1), load=jnp.float32(2))),
             'block_03': types.SimpleNamespace(losses=dict(importance=jnp.float32(4)))}
  assert build(name='classification', router_losses=how).router_loss(output(LOGITS, routers)) == expected


def test_a_model_without_routers_adds_nothing():
  assert build(name='classification', router_losses='mean').router_loss(output(LOGITS)) == 0


@pytest.mark.parametrize('config, sentence', [
    (dict(name='classification', loss='hinge'), "config.objective.loss must be one of 'softmax', 'sigmoid'"),
    (dict(name='classification', label_smoothing=1.), 'config.objective.label_smoothing must be a float of at least 0 and below 1'),
    (dict(name='classification', loss='sigmoid', label_smoothing=.1), 'label_smoothing is for loss="softmax"'),
    (dict(name='language_model', router_losses='max'), "config.objective.router_losses must be one of 'sum', 'mean'"),
])
def test_what_cannot_be_built_is_said_in_a_sentence(config, sentence):
  with pytest.raises(ConfigError) as error:
    build(**config)
  assert sentence in str(error.value)
