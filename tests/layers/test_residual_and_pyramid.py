"""DeepSpeed-MoE's two changes of the layer (2201.05596, section 4.1): a fixed feed-forward beside the expert, added
by a sum or by a learned gate; more experts in later layers. Against the parts alone, and formulas derived by hand."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional, models
from moejax.config import ConfigError, call
from moejax.layers import pattern
from moejax.layers.feed_forwards.moe import MoE
from moejax.layers.stack import Stack
from moejax.routing import papers

B, S, D, F, E = 4, 6, 8, 12, 4
X = jax.random.normal(jax.random.key(1), (B, S, D))


@functools.cache
def residual(gate, shared=True):
  config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=F), router=papers.deepspeed(),
                dispatch=dict(name='gather'), shared=dict(name='feed_forward', hidden=5) if shared else None,
                shared_gate=gate)
  layer = functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)
  return layer, jax.jit(lambda params: layer.apply(params, {}, X)[0])


def drawn(layer):
  draw = np.random.default_rng(0)
  return {name: jax.tree.map(lambda leaf: draw.normal(0, 0.4, leaf.shape).astype(np.float32), part)
          for name, part in sorted(layer.shapes()[0].items())}


def without(params, *names):
  return {name: part for name, part in params.items() if name not in names}


def parts(params):
  """(the routed experts' output, the fixed one's) in float32."""
  routed = residual('sum', shared=False)[1](without(params, 'shared', 'shared_gate'))
  both = residual('sum')[1](without(params, 'shared_gate'))
  return np.asarray(routed), np.asarray(both) - np.asarray(routed)


def test_the_softmax_gate_weighs_the_routed_and_the_fixed_expert_token_by_token():
  layer, run = residual('softmax')
  params = drawn(layer)
  assert {name: leaf.shape for name, leaf in params['shared_gate'].items()} == dict(kernel=(D, 2), bias=(2,))
  params['shared_gate']['bias'] = np.float32([0.3, -0.2])
  routed, fixed = parts(params)
  # c = softmax(x W + b), float64: deepspeed/moe/layer.py weighs the experts with c_0 and the feed-forward with c_1.
  logits = np.asarray(X, np.float64) @ params['shared_gate']['kernel'] + params['shared_gate']['bias']
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(run(params), share[..., :1] * routed + share[..., 1:] * fixed, atol=2e-6)
  assert share[..., 0].std() > 0.1  # another share for every token


def test_a_gate_that_gives_all_to_the_fixed_expert_is_the_dense_layer():
  layer, run = residual('softmax')
  params = drawn(layer)
  params['shared_gate'] = dict(kernel=np.zeros((D, 2), np.float32), bias=np.float32([-200, 200]))
  np.testing.assert_allclose(run(params), parts(params)[1], atol=2e-6)


def test_a_gate_without_a_fixed_expert_is_refused():
  with pytest.raises(ConfigError, match=r'config\.moe\.shared_gate = "softmax" requires a shared expert: set config\.moe\.shared'):
    residual('softmax', shared=False)


# Pyramids.


def decoder(num_experts, **options):
  moe = dict(num_experts=num_experts, experts=dict(name='feed_forward', hidden=F), router=papers.deepspeed(),
             dispatch=dict(name='gather'), group='sequence', shared=dict(name='feed_forward', hidden=5),
             shared_gate='softmax')
  return dict(name='decoder', vocab_size=13, dim=D, num_layers=6, attention=dict(heads=2), feed_forward=dict(hidden=F),
              sparse=dict(name='every', n=2), moe=moe, routing_leak='train') | options


TOKENS = dict(tokens=jax.ShapeDtypeStruct((2, 6), jnp.int32))


def test_the_parameters_of_a_pyramid_equal_the_formula():
  """Residual layers of n experts add D*n for the router, 2*D*F*n for the experts, and 2*D*5 + (D + 1)*2 beside them; of
  one expert per layer is active. Dense layers have 2*D*F; every layer 4*D^2 for attention and 2*D for norms."""
  numbers = [2, 2, 8]
  beside = 2 * D * 5 + (D + 1) * 2
  rest = 2 * 13 * D + D + 6 * (4 * D * D + 2 * D) + 3 * 2 * D * F + 3 * beside + sum(D * n for n in numbers)
  counts = models.parameter_counts(models.build(decoder(numbers)), TOKENS)
  assert counts == dict(total=rest + sum(2 * D * F * n for n in numbers), active=rest + 3 * 2 * D * F)


def test_a_pyramid_costs_the_flops_of_a_uniform_model_but_for_its_routers():
  flops = {str(numbers): models.forward_flops(models.build(decoder(numbers)), TOKENS) for numbers in ([2, 2, 8], 4)}
  assert flops['[2, 2, 8]'] == flops['4']  # 2*D*E a token and router, and 2 + 2 + 8 = 3*4


def test_a_pyramid_scanned_is_the_pyramid_unrolled():
  """[2, 2, 8]: the first two sparse layers are one segment of the scan, the last is another."""
  unrolled, scanned = (models.build(decoder([2, 2, 8], stacking=stacking)) for stacking in ('unrolled', 'scan'))
  kinds, _ = pattern.mixtures(dict(num_experts=[2, 2, 8]), ('dense', 'sparse') * 3)
  assert kinds == ('dense', 'sparse of 2', 'dense', 'sparse of 2', 'dense', 'sparse of 8')
  draw = np.random.default_rng(0)
  params = functional.unflatten({
      path: jnp.float32(draw.normal(float(path.endswith('scale')), 0.4, leaf.shape))
      for path, leaf in functional.flatten(unrolled.shapes()[0]).items()})
  other = params | dict(blocks=Stack(kinds).scanned(params['blocks']))
  batch = dict(tokens=jnp.asarray([[1, 5, 2, 9, 4, 7], [3, 3, 8, 1, 12, 6]]))
  one, two = jax.jit(unrolled.apply)(params, {}, batch), jax.jit(scanned.apply)(other, {}, batch)
  np.testing.assert_allclose(two.logits, one.logits, rtol=1e-4, atol=1e-5)
  assert [router.plan.num_experts for router in two.routers.values()] == [2, 2, 8]


@pytest.mark.parametrize('numbers', [[2, 4], [2, 4, 8, 8], [2, 4, 'many']])
def test_a_pyramid_needs_a_number_for_every_sparse_layer(numbers):
  with pytest.raises(ConfigError, match=r'config\.model\.moe\.num_experts = .* one int for each of the 3'):
    models.build(decoder(numbers))


def test_a_sparse_layer_without_experts_is_refused():
  with pytest.raises(ConfigError, match=r'config\.model\.moe\.num_experts must be an int from 1 to 1048576, not 0'):
    models.build(decoder([2, 2, 0]))
