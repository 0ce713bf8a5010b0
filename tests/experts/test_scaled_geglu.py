"""The expert of st-moe-pytorch against a float64 loop over rows of its definition, and its initial values."""
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import experts, functional
from moejax.experts.layouts import Dense

D, F = 6, 10


def test_is_the_loop_over_rows():
  model = functional.functionalize(lambda rngs: experts.build(
      dict(name='scaled_geglu', hidden=F), 'experts', dim=D, num_experts=None, dtype=jnp.float32, rngs=rngs))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: draw.normal(0, 0.5, leaf.shape).astype(np.float32), model.shapes()[0])
  x = draw.normal(size=(5, D)).astype(np.float32)
  expected = []
  for row in np.asarray(x, np.float64):
    gate = row @ params['wg'] + params['bg']
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    expected.append((params['scale'] * gelu * (row @ params['wi'] + params['bi'])) @ params['wo'] + params['bo'])
  np.testing.assert_allclose(model.apply(params, {}, x, Dense()), expected, atol=1e-5)


def test_starts_uniform_in_the_outputs_of_each_map_with_scales_of_one():
  module = experts.build(dict(name='scaled_geglu', hidden=256), 'experts', dim=64, num_experts=2, dtype=jnp.float32,
                         rngs=nnx.Rngs(0))
  assert module.scale.get_metadata()['axes'] == ('expert', 'expert_mlp') and (module.scale[...] == 1).all()
  # U(-b, b) has standard deviation b/sqrt(3); b = 1/sqrt(2*256) and 1/sqrt(64). Thousands of draws: within 3%.
  for name, outputs in (('wi', 512), ('wg', 512), ('wo', 64)):
    weight = np.asarray(getattr(module, name)[...])
    assert abs(weight).max() <= outputs**-0.5 and weight[0].std() != weight[1].std()
    np.testing.assert_allclose(weight.std(), outputs**-0.5 / np.sqrt(3), rtol=0.03)
