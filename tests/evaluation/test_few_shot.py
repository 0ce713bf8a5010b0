"""The few-shot probe against the normal equations, explicit leave-one-out fits, and a separable toy."""
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from moejax import evaluation
from moejax.config import ConfigError
from moejax.evaluation import few_shot
from moejax.parallel import mesh as mesh_lib

MESH = mesh_lib.build(dict(data=1), devices=jax.devices()[:1])


@hypothesis.given(rows=st.integers(3, 12), dim=st.integers(2, 12), power=st.integers(-3, 8), seed=st.integers(0, 999))
def test_the_closed_form_solves_the_normal_equations(rows, dim, power, seed):
  rng = np.random.default_rng(seed)
  x, y, r = rng.normal(size=(rows, dim)), rng.choice([-1., 1.], size=(rows, 3)), 2. ** power
  expected = np.linalg.solve(x.T @ x + r * np.eye(dim), x.T @ y)
  np.testing.assert_allclose(few_shot.ridge(x, y, [r]), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('rows, dim', [(9, 4), (5, 12)])
def test_the_regulariser_has_the_least_error_when_each_example_is_left_out_in_turn(rows, dim):
  rng = np.random.default_rng(3)
  x = rng.normal(size=(rows, dim))
  y = np.sign(x[:, :2] + rng.normal(size=(rows, 2)))
  grid = 2. ** np.arange(-4, 9)

  def left_out(r):
    errors = []
    for i in range(rows):
      others = np.arange(rows) != i
      w = np.linalg.solve(x[others].T @ x[others] + r * np.eye(dim), x[others].T @ y[others])
      errors.append((x[i] @ w - y[i]) ** 2)
    return np.mean(errors)

  best = grid[np.argmin([left_out(r) for r in grid])]
  assert grid[0] < best < grid[-1]  # otherwise the case would prove nothing
  np.testing.assert_allclose(few_shot.ridge(x, y, grid), few_shot.ridge(x, y, [best]))


def test_constant_features_and_shifts_change_nothing():
  rng = np.random.default_rng(0)
  x, labels, tests = rng.normal(size=(12, 3)), np.arange(12) % 3, rng.normal(size=(20, 3))
  plain = few_shot.ridge_accuracy(x, labels, tests, np.arange(20) % 3)
  move = lambda rows: np.hstack([1000 + 5 * rows, np.full((len(rows), 1), 7.)])
  moved = few_shot.ridge_accuracy(move(x), labels, move(tests), np.arange(20) % 3)
  assert moved == plain


class Clusters:
  """Three classes around three corners; the features never contain the label. One padding example per split."""
  splits = ('train', 'test')

  def __init__(self, noise, per_class=12):
    self.noise, self.per_class = noise, per_class

  def batch_spec(self, batch_size=None):
    size = batch_size or 5
    return dict(image=jax.ShapeDtypeStruct((size, 3), np.float32), label=jax.ShapeDtypeStruct((size,), np.int32),
                valid=jax.ShapeDtypeStruct((size,), bool))

  def evaluate(self, split, batch_size=None, rows=None):
    rng = np.random.default_rng(dict(train=1, test=2)[split])
    label = np.repeat(np.arange(3), self.per_class).astype(np.int32)
    image = (5 * np.eye(3)[label] + self.noise * rng.normal(size=(len(label), 3))).astype(np.float32)
    size, count = batch_size or 5, len(label)
    total = -(-count // size) * size
    padded = dict(image=np.concatenate([image, np.full((total - count, 3), np.nan, np.float32)]),
                  label=np.concatenate([label, np.zeros(total - count, np.int32)]), valid=np.arange(total) < count)
    for start in range(0, total, size):
      yield {k: x[start:start + size] for k, x in padded.items()}


def probe(pipeline, **config):
  apply = lambda params, state, batch: types.SimpleNamespace(features=batch['image'] @ params['w'])
  evaluators = evaluation.build({'probe': dict(name='few_shot', **config)}, pipeline=pipeline, apply=apply, mesh=MESH)
  return evaluators['probe']({'w': np.eye(3, dtype=np.float32)}, {})


def test_one_example_per_class_separates_distinct_clusters():
  assert probe(Clusters(noise=0.1), shots=(1, 5)) == {'1_shot_accuracy': 1., '5_shot_accuracy': 1.}


def test_uninformative_features_give_chance_accuracy():
  accuracy = probe(Clusters(noise=1e6, per_class=100), shots=(10,))['10_shot_accuracy']
  assert abs(accuracy - 1 / 3) < 4 * np.sqrt(2 / 9 / 300)  # four standard deviations of 300 guesses among three


def test_the_same_seed_chooses_the_same_examples_whatever_the_batch_size():
  pipeline = Clusters(noise=3.)
  first = probe(pipeline, shots=(1, 3), seed=5)
  assert first == probe(pipeline, shots=(1, 3), seed=5, batch_size=7) == probe(pipeline, shots=(3, 1), seed=5)
  assert any(probe(pipeline, shots=(1,), seed=s) != probe(pipeline, shots=(1,), seed=5) for s in range(4))


def test_more_shots_than_examples_are_refused_with_the_class_and_its_count():
  with pytest.raises(ConfigError, match='class 0 has 12 examples, fewer than 25 shots'):
    probe(Clusters(noise=1.))
