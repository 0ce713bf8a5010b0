"""The routers of lucidrains, with numbers by hand."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
import routing_reference as reference

KEY = jax.random.key(0)


def test_with_policy_none_a_token_has_one_expert_with_its_share_of_two():
  """lucidrains/mixture-of-experts renormalises before the policy: (.5, .3) gives the first 5/8."""
  built = functional.functionalize(lambda rngs: router.build(
      papers.lucidrains(policy='none', z=0., capacity_factor=4.), 'router', dim=4, num_experts=4, rngs=rngs))
  out = built.apply(dict(score=dict(kernel=jnp.eye(4))), {}, jnp.log(jnp.float32([[[.5, .3, .1, .1]]])), RouterInputs(),
                    key=KEY, train=True)
  np.testing.assert_allclose(out.plan.to_dense().weight[0, 0], [5 / 8, 0, 0, 0], rtol=1e-6)


# First choices that have a slot, in the balance loss of st-moe-pytorch. 2 experts; probabilities 3/4 and 1/4.
#   6 tokens that want expert 0, int(6*1.25/2) = 3 slots, at least 4: F = (4/6, 0), P = (3/4, 1/4): 2*4/6*3/4 = 1.
#   6 of 8, 2 want expert 1, int(8*1.25/2) = 5 slots: F = (5/8, 2/8), P = (5/8, 3/8): 2*(25+6)/64 = 31/32.
#   2 of 4: 4 slots, for everyone: 2*(1/2*1/2 + 1/2*1/2) = 1.
#   All first choices: 2*3/4, 2*(3/4*5/8 + 1/4*3/8) and 1.
@pytest.mark.parametrize('straight_through', [False, True])
@pytest.mark.parametrize('want_0, want_1, kept, everyone', [(6, 0, 1, 3 / 2), (6, 2, 31 / 32, 9 / 8), (2, 2, 1, 1)])
def test_the_balance_loss_of_st_moe_pytorch_counts_first_choices_that_have_a_slot(
    want_0, want_1, kept, everyone, straight_through):
  values = jnp.log(jnp.float32([[[3, 1]] * want_0 + [[1, 3]] * want_1]))

  def loss(**config):
    fragment = papers.lucidrains(straight_through=straight_through, z=0., **config)
    built = router.build(fragment, 'router', dim=2, num_experts=2, rngs=nnx.Rngs(0))
    built.score.kernel[...] = jnp.eye(2)
    output = reference.run(built, values, RouterInputs(), key=KEY, train=True)
    return sum(output.losses.values()) / 0.01

  assert float(loss()) == pytest.approx(kept, rel=1e-5)
  assert float(loss(balance_counts='all')) == pytest.approx(everyone, rel=1e-5)
