"""Collected routes against the known plans of given routers."""
import numpy as np
import pytest

from analysis_fakes import CLASSES, MESH, SIDE, by_class, dense, model, soft, split
from moejax.analysis import routes


def collected(max_tokens=10**6, **routers):
  return routes.collect(model(**routers), {}, {}, split(), MESH, max_tokens)


def test_weights_are_by_example_and_token_however_tokens_were_grouped():
  layer = collected(block_01=by_class(CLASSES)).layers['block_01']
  assert layer.weight.shape == (10, SIDE * SIDE, CLASSES)  # ten examples: padded ones are left out
  for example in range(10):
    for token in range(SIDE * SIDE):
      expected = np.zeros(CLASSES)
      expected[example % CLASSES] = 0.5 if token else 0.  # the first patch is dropped
      np.testing.assert_array_equal(layer.weight[example, token], expected)
  np.testing.assert_array_equal(layer.first[:, 0], -1)
  np.testing.assert_array_equal(layer.first[:, 1], np.arange(10) % CLASSES)


def test_metrics_and_load_are_means_over_valid_tokens():
  layer = collected(block_01=by_class(CLASSES)).layers['block_01']
  np.testing.assert_allclose(layer.load, 1 / CLASSES)
  assert layer.metrics == pytest.approx(dict(dropped=0.25, confidence=0.6, entropy=0.9, importance_loss=0.1))


def test_soft_plans_give_the_write_and_read_shares_of_experts():
  layer = collected(block_01=soft(3)).layers['block_01']
  np.testing.assert_allclose(layer.weight, np.full((10, SIDE * SIDE, 3), 1 / 3), rtol=1e-6)
  np.testing.assert_allclose(layer.read, 2 / (SIDE * SIDE), rtol=1e-6)  # two slots per expert, each a mean of 9 tokens


def test_layers_are_in_the_order_of_depth_with_the_encoder_first():
  names = ['decoder_block_03', 'encoder_block_11', 'encoder_block_03']
  order = list(collected(**{name: dense(2) for name in names}).layers)
  assert order == ['encoder_block_03', 'encoder_block_11', 'decoder_block_03']


def test_no_more_batches_are_run_than_needed():
  assert len(collected(max_tokens=1, block_01=dense(2)).batch['label']) == 4


def test_a_dense_model_has_examples_and_no_layers():
  taken = collected()
  assert taken.layers == {} and len(taken.batch['label']) == 10


@pytest.mark.parametrize('router, rows', [
    (by_class(4), 1),        # one choice
    (dense(5), 5),           # all experts
    (soft(3), 3 * 2 / 9),    # 3 experts x 2 slots for 9 tokens
])
def test_rows_of_expert_computation_per_token(router, rows):
  functional = model(block_01=router)
  assert routes.experts_per_token(functional, split().spec)['block_01'] == pytest.approx(rows)


