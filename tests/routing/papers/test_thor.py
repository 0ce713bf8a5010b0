"""THOR: experts by chance, one for what is drawn together."""
from flax import nnx
import jax
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.stages import SCORES
from tasks_and_documents import D, DOCUMENTS, E, routed


def test_training_draws_one_expert_for_the_whole_batch_and_each_equally_often():
  drawn = []
  for key in range(400):
    expert = np.asarray(routed(papers.thor(), key)[0].plan.expert)
    assert (expert == expert[0, 0, 0]).all()
    drawn.append(int(expert[0, 0, 0]))
  counts = np.bincount(drawn, minlength=E)
  # Chi-squared with 3 degrees of freedom: its 1 - 1e-6 quantile is 30.7.
  assert ((counts - 100) ** 2 / 100).sum() < 30.7


def evaluated(level, seed=0, layer=0):
  """[G,S] the experts sampled at evaluation."""
  score = SCORES.build({**papers.thor(level, seed=seed)['score']}, 'config.score', dim=None, num_experts=E,
                       rngs=nnx.Rngs(layer))
  return np.asarray(score(DOCUMENTS, key=None, train=False).logits.argmax(-1))


@pytest.mark.parametrize('level', ['token', 'document'])
def test_evaluation_draws_one_expert_a_token_or_document_once_and_for_all(level):
  seeds = [evaluated(level, seed) for seed in range(12)]
  np.testing.assert_array_equal(seeds[0], evaluated(level, 0))
  assert len({expert.tobytes() for expert in seeds}) > 6
  within = np.concatenate([expert[:, 3:7] for expert in seeds])  # of one document in each row
  alike = (within == within[:, :1]).all(-1)
  assert alike.all() if level == 'document' else not alike.all()
  across = np.stack([expert[0, [0, 3, 8]] for expert in seeds])  # of three documents
  assert not (across == across[:, :1]).all()


def test_layers_draw_on_their_own_and_keep_what_tells_them_apart():
  assert len({evaluated('token', layer=layer).tobytes() for layer in range(3)}) == 3
  out, state = routed(papers.thor())
  merged = functional.merge_updates(state, out.updates)
  assert jax.tree.map(int, merged) == jax.tree.map(int, state)


def test_a_draw_for_every_document_needs_documents():
  with pytest.raises(ConfigError, match=r"Set features=dict\(name='documents'\)"):
    router.build({**papers.thor(), 'features': dict(name='token')}, 'config.router', dim=D, num_experts=E,
                 rngs=nnx.Rngs(0))
