"""The hierarchical layer against `HeirarchicalMoE` of lucidrains/mixture-of-experts, a port of Mesh TensorFlow's."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs

pytestmark = pytest.mark.oracle

B, S, D, N, M = 2, 24, 6, 3, 4


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('capacity_factor', [1.25, 8.])
def test_moe_2d_is_the_hierarchical_layer_of_lucidrains(train, capacity_factor):
  import mixture_of_experts
  import torch

  class Scaled(torch.nn.Module):
    """Expert e computes tanh((1 + e) x): what is dropped, or has another weight, shows."""

    def forward(self, x):  # [N, M, slots, D]
      return torch.tanh((1 + torch.arange(N * M).reshape(N, M, 1, 1)) * x)

  generator = np.random.default_rng(0)
  x = generator.normal(size=(B, S, D)).astype(np.float32)
  outer, inner = (generator.normal(size=shape).astype(np.float32) for shape in ((D, N), (D, N, M)))
  theirs = mixture_of_experts.HeirarchicalMoE(
      dim=D, num_experts=(N, M), second_policy_train='all', second_policy_eval='all',
      capacity_factor_train=capacity_factor, capacity_factor_eval=capacity_factor, experts=Scaled()).train(train)
  with torch.no_grad():
    theirs.gate_outer.w_gating.copy_(torch.tensor(outer))
    theirs.gate_inner.w_gating.copy_(torch.tensor(inner.swapaxes(0, 1)))
    expected = theirs(torch.tensor(x))[0].numpy()

  # One capacity factor for both levels there. A batch row is a routing group here and there.
  module = router.build(
      papers.moe_2d(groups=N, second='all', eval_second='all', capacity_factor=capacity_factor,
                    eval_capacity_factor=capacity_factor, second_level_factor=capacity_factor),
      'config.router', dim=D, num_experts=N * M, rngs=nnx.Rngs(0))
  module.score.outer[...], module.score.inner[...] = jnp.asarray(outer), jnp.asarray(inner)
  plan = module(x, RouterInputs(), key=jax.random.key(0), train=train).plan
  weight = np.asarray(plan.to_dense().weight)
  ours = sum(weight[..., e, None] * np.tanh((1 + e) * x) for e in range(N * M))
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert plan.kept.all() == (capacity_factor == 8.)
