"""The contrastive and the CTC objective against float64 loops, and the evaluators made for them by hand."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.training import objectives

RNG = np.random.default_rng(0)


def output(logits, **extras):
  return types.SimpleNamespace(logits=jnp.asarray(logits, jnp.float32), routers={},
                               extras={name: jnp.asarray(x, jnp.float32) for name, x in extras.items()})


@pytest.mark.parametrize('valid', [[True] * 5, [True, True, False, True, False], [False] * 5])
def test_the_contrastive_loss_is_that_of_a_loop_over_pairs(valid):
  logits = 3 * RNG.normal(size=(5, 5))
  loss, metrics = objectives.build(dict(name='contrastive'), 'objective')(output(logits), dict(valid=jnp.array(valid)))
  pairs = np.flatnonzero(valid)
  losses, hits = [], dict(image_to_text=[], text_to_image=[])
  for i in pairs:
    for name, row in (('image_to_text', logits[i, pairs]), ('text_to_image', logits[pairs, i])):
      losses.append(np.log(np.exp(row).sum()) - logits[i, i])
      hits[name].append(pairs[row.argmax()] == i)
  np.testing.assert_allclose(loss, np.mean(losses) if losses else 0, rtol=1e-5)
  for name, hit in hits.items():
    np.testing.assert_allclose(metrics[f'{name}_accuracy'], np.mean(hit) if hit else 0, rtol=1e-6)


def test_invalid_pairs_have_no_gradient():
  objective, valid = objectives.build(dict(name='contrastive'), 'objective'), jnp.array([True, True, False])
  slope = jax.grad(lambda logits: objective(output(logits), dict(valid=valid))[0])(jnp.array(RNG.normal(size=(3, 3))))
  assert (slope[2] == 0).all() and (slope[:, 2] == 0).all() and (slope[:2, :2] != 0).all()


def test_uniform_logits_cost_the_logarithm_of_the_number_of_pairs():
  loss, _ = objectives.build(dict(name='contrastive'), 'objective')(output(np.zeros((7, 7))), dict(valid=jnp.ones(7, bool)))
  assert float(loss) == pytest.approx(np.log(7), rel=1e-6)


def test_ctc_is_a_mean_over_utterances_with_the_shared_head_at_its_coefficient():
  # Uniform over V = 3. 'a' in 1 frame: 1 path of 3; in 2 frames: aa, a-, -a: 3 of 9. The third row is padding.
  batch = dict(segments=jnp.array([[1, 0], [1, 1], [0, 0]]), targets=jnp.array([[1], [1], [0]]),
               loss_mask=jnp.array([[1.], [1.], [0.]]))
  uniform = np.zeros((3, 2, 3))
  certain = uniform.copy()
  certain[:, :, 1] = 100  # spells 'a' always
  loss, metrics = objectives.build(dict(name='ctc', shared=0.1), 'objective')(
      output(certain, shared_logits=uniform), batch)
  assert float(metrics['ctc_loss']) == pytest.approx(0, abs=1e-5)
  assert float(metrics['shared_ctc_loss']) == pytest.approx(np.log(3), rel=1e-5)
  assert float(loss) == pytest.approx(0.1 * np.log(3), rel=1e-4)
