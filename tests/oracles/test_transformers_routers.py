"""Routers against `transformers`: Switch Transformer's layer, and NLLB-MoE's router, which is fairseq's top-2 gating.

`NllbMoeSparseMLP`, the layer around that router, is not compared: it does not do what its router says.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import call
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs

pytestmark = pytest.mark.oracle

B, S, D, F, E = 3, 12, 8, 10, 4
X = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)


@pytest.mark.parametrize('capacity', [1, 3, 12])
def test_switch_equals_its_sparse_layer(capacity):
  import torch
  import torch_weights
  import transformers
  from transformers.models.switch_transformers import modeling_switch_transformers as theirs
  config = transformers.SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=E, expert_capacity=capacity,
                                                 dense_act_fn='relu', router_jitter_noise=0.01)
  module = torch_weights.randomise(theirs.SwitchTransformersSparseMLP(config))
  with torch.no_grad():
    expected = module(torch.tensor(X)).numpy()
  # A factor of 1 is S/E slots. Their capacity is a number of slots of each sequence.
  config = papers.switch(capacity_factor=1., eval_capacity_factor=capacity * E / S)
  config['place'] |= dict(min_capacity=0)
  layer = functional.functionalize(lambda rngs: call(
      MoE, dict(num_experts=E, experts=dict(name='feed_forward', hidden=F, activation='relu'), router=config,
           dispatch=dict(name='gather'), group='sequence'), 'moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)
  stacked = lambda name: np.stack([getattr(module.experts[f'expert_{e}'], name).weight.detach().numpy().T
                                   for e in range(E)])
  params = dict(router=dict(score=dict(kernel=module.router.classifier.weight.detach().numpy().T)),
                experts=dict(wi=stacked('wi'), wo=stacked('wo')))
  y, output = jax.jit(layer.apply)(params, {}, X)
  np.testing.assert_allclose(y, expected, atol=2e-6 * abs(expected).max())
  dropped = 1 - (abs(expected).sum(-1) > 0).mean()
  assert float(output.metrics['dropped']) == pytest.approx(dropped) and (dropped > 0.1) == (capacity < 12)


def theirs_top_2(logits, fraction, **options):
  """[S,E] combine weights of `NllbMoeTop2Router`."""
  import torch
  import transformers
  from transformers.models.nllb_moe import modeling_nllb_moe as theirs
  config = transformers.NllbMoeConfig(
      num_experts=E, d_model=E, router_bias=False, router_dtype='float32',
      second_expert_policy='all', moe_eval_capacity_token_fraction=-1. if fraction is None else fraction, **options)
  module = theirs.NllbMoeTop2Router(config).eval()
  module.expert_capacity = None  # what makes it count slots itself; the config takes whole numbers only
  first, weights = module.route_tokens(torch.tensor(logits))
  return first.numpy(), weights.detach().numpy()


def ours(config, logits):
  built = functional.functionalize(lambda rngs: router.build(config, 'router', dim=E, num_experts=E, rngs=rngs))
  return jax.jit(functools.partial(built.apply, train=False))(dict(score=dict(kernel=jnp.eye(E))), {},
                                                              jnp.asarray(logits)[None], RouterInputs())


@pytest.mark.parametrize('fraction', [0.25, 0.1, None])
@pytest.mark.parametrize('batch_priority', [False, True])
@pytest.mark.parametrize('renormalize', ['before', 'after'])
def test_fairseq_equals_the_router_of_nllb_moe(renormalize, batch_priority, fraction):
  # Most tokens prefer the last expert, so that it overflows: 2*ceil(30/4) = 16 slots, or ceil(7.5) = 8, ceil(3) = 3.
  logits = np.random.default_rng(1).normal(size=(30, E)).astype(np.float32) + np.float32([0, 0, 0, 1.5])
  first, expected = theirs_top_2(logits, fraction, batch_prioritized_routing=batch_priority,
                                 normalize_router_prob_before_dropping=renormalize == 'before')
  out = ours(papers.fairseq(renormalize=renormalize, batch_priority=batch_priority, eval_fraction=fraction), logits)
  np.testing.assert_allclose(out.plan.to_dense().weight[0], expected, atol=1e-6)
  kept_first = np.asarray(out.plan.kept[0, :, 0])
  np.testing.assert_array_equal(kept_first, first.sum(-1) > 0)
  assert out.metrics['dropped'] > 0.05
  if renormalize == 'after':  # the survivor of two has weight 1
    total = np.asarray(out.plan.to_dense().weight[0]).sum(-1)
    np.testing.assert_allclose(total[total > 0], 1, rtol=1e-6)


def test_gshard_equals_it_where_gates_are_renormalised_before():
  logits = np.random.default_rng(2).normal(size=(30, E)).astype(np.float32) + np.float32([0, 0, 0, 1.5])
  # ceil(30*0.25) = 8 slots; GShard's 2*S/E times a factor: 15*0.53.
  _, expected = theirs_top_2(logits, 0.25, normalize_router_prob_before_dropping=True)
  out = ours(papers.gshard(second='all', capacity_factor=8 / 15), logits)
  np.testing.assert_allclose(out.plan.to_dense().weight[0], expected, atol=1e-6)
