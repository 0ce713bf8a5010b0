"""Papers' whole routers in training, with their default hyperparameters, against float64 loops over groups and tokens.

Tests of stages prove the stages; these prove that a router is made of the right ones, with its own noise, capacity,
priority and coefficients. Draws are replaced by known numbers, which the loops use as well.
"""
import numpy as np
import pytest

import paper_loops as loops
from paper_steps import VALID, X, known_draws, route  # noqa: F401 (the fixture is for all tests here)
from moejax import functional
from moejax.routing import papers
from routing_reference import softmax

# name of the paper, and of a variant: loop, number of experts, arguments
PAPERS = {
    'vmoe': (loops.vmoe, 4, {}),
    'limoe': (loops.limoe, 24, {}),
    'gmoe': (loops.gmoe, 4, {}),
    'widenet': (loops.widenet, 4, {}),
    'switch': (loops.switch, 4, {}),
    'gshard': (loops.gshard, 4, {}),
    'st_moe': (loops.st_moe, 4, {}),
    'glam': (loops.glam, 4, {}),
    'lucidrains': (loops.lucidrains, 4, {}),
    'fairseq': (loops.fairseq, 4, {}),
    'fairseq random': (loops.fairseq_random, 4, dict(second='random')),
    'fairseq random before': (loops.fairseq_random_before, 4, dict(second='random', renormalize='before')),
    'deepspeed': (loops.deepspeed, 4, {}),
    'deepspeed 2': (loops.deepspeed_top_2, 4, dict(k=2)),
    'deepspeed 3': (loops.deepspeed_top_3, 4, dict(k=3)),
    'fastmoe': (loops.fastmoe, 4, {}),
    'fastmoe switch': (loops.fastmoe_switch, 4, dict(gate='switch')),
    'top_k_dropless': (loops.mixtral, 4, {}),
    'loss_free': (loops.loss_free, 8, {}),
    'sparsely_gated': (loops.sparsely_gated, 8, {}),
    's_base': (loops.s_base, 4, {}),
    'task_aware': (loops.task_aware, 4, dict(num_tasks=3)),
    'speech_moe': (loops.speech_moe, 4, dict(shared_dim=5)),
    'expert_choice': (loops.expert_choice, 4, {}),
    'moe_2d': (loops.moe_2d, 16, {}),
    'hierarchical': (loops.hierarchical, 48, {}),
    'xmoe': (loops.xmoe, 4, {}),
    'mtf_expert_choice': (loops.mtf_expert_choice, 4, {}),
    'rl_routing': (loops.rl_routing, 4, {}),
}


@pytest.mark.parametrize('name', PAPERS)
def test_a_training_step_and_its_losses_equal_a_loop(name):
  loop, num_experts, arguments = PAPERS[name]
  fragment = getattr(papers, name.split()[0])(**arguments)
  output, params = route(fragment, num_experts)
  weights, losses = loop(params)
  np.testing.assert_allclose(output.plan.to_dense().weight, weights, atol=2e-5)
  assert set(output.losses) == set(losses)
  for loss, value in losses.items():
    assert float(output.losses[loss]) == pytest.approx(value, rel=1e-4), loss
  if name == 's_base':  # a balanced plan leaves slots free
    assert output.plan.capacity == 51
  elif 'capacity' in fragment['place']['name']:
    assert output.metrics['dropped'] > 0.01  # or the capacity would not show


def test_soft_moe_mixes_tokens_into_a_slot_of_each_expert_and_slots_into_tokens():
  output, params = route(papers.soft_moe(), 4)
  unit = lambda a, axis: a / np.sqrt((a**2).sum(axis, keepdims=True) + 1e-6)
  logits = params['scale'] * np.einsum('gsd,dec->gsec', unit(X.astype(np.float64), -1), unit(params['phi'], 0))
  valid = VALID[..., None, None]
  np.testing.assert_allclose(output.plan.dispatch, softmax(np.where(valid, logits, -np.inf), axis=1), atol=1e-6)
  np.testing.assert_allclose(output.plan.combine, softmax(logits, axis=2) * valid, atol=1e-6)
  assert logits.shape[-1] == 1 and output.losses == {}


def test_loss_free_s_bias_steps_by_a_thousandth_against_the_load():
  output, params = route(papers.loss_free(), 8)
  load = np.asarray(output.plan.shares()).sum((0, 1))
  stepped = params['bias'] + 1e-3 * np.sign(load.mean() - load)
  state = functional.merge_updates(dict(balance=dict(bias=dict(bias=params['bias']))), output.updates)
  np.testing.assert_allclose(state['balance']['bias']['bias'], stepped, atol=1e-6)


def test_base_is_balanced_and_weighs_by_the_sigmoid_of_the_affinity():
  output, params = route(papers.base(), 4)
  weights = np.asarray(output.plan.to_dense().weight)
  sigmoid = 1 / (1 + np.exp(-(X @ params['kernel'])))
  np.testing.assert_allclose(weights, np.where(weights > 0, sigmoid, 0), atol=1e-5)
  np.testing.assert_array_equal((weights > 0).sum(1), VALID.sum(1)[:, None] / np.full(4, 4))
  assert output.losses == {}
