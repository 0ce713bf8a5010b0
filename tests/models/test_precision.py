"""bfloat16 computes; parameters, routers and logits stay float32."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from moejax import models

TOKENS = jnp.asarray([[1, 5, 2, 9, 4, 7]])


@pytest.mark.parametrize('config, batch', [
    (tiny.decoder(tiny.SWITCH, stacking='scan', remat='dots'), dict(tokens=TOKENS)),
    (tiny.encoder_decoder(tiny.SWITCH, tiny.SWITCH), dict(encoder_tokens=TOKENS, decoder_tokens=TOKENS)),
    (tiny.vision(tiny.SWITCH, pool='map'), dict(image=jnp.ones((1, 8, 8, 1)))),
], ids=['decoder', 'encoder_decoder', 'vision'])
def test_only_activations_are_bfloat16(config, batch):
  model = models.build(config | dict(dtype='bfloat16'))
  params, state = model.shapes()
  output = jax.eval_shape(model.apply, params, state, batch)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  assert output.features.dtype == jnp.bfloat16 and output.logits.dtype == jnp.float32
  for router in output.routers.values():
    assert router.plan.weight.dtype == jnp.float32
    assert all(metric.dtype == jnp.float32 for metric in router.metrics.values())


def test_bfloat16_logits_equal_float32_up_to_rounding():
  config = tiny.decoder(embedding_init=dict(name='normal', std=1.))
  _, params, state, apply = tiny.initialised(config)
  exact = apply(params, state, dict(tokens=TOKENS)).logits
  rounded = jax.jit(models.build(config | dict(dtype='bfloat16')).apply)(params, state, dict(tokens=TOKENS)).logits
  # Some ten roundings of relative size 2^-9 one after the other, on logits of size 1.
  assert 0 < np.abs(exact - rounded).max() < 0.05
